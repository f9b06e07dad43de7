"""What the page's buttons do, called as gradio calls them."""

import html
import os
import shutil

import pytest

import eigenlorax as ex
from adapters import make_adapter
from eigenlorax.app import inputs
from eigenlorax.app.settings import Settings, is_private

gradio = pytest.importorskip("gradio", reason="gradio is not installed: pip install '.[app]'")
from eigenlorax.app import page  # noqa: E402 imports gradio

pytestmark = pytest.mark.usefixtures("module_without_shape_checks")
SESSION, REPORT, NOTES, REPORT_FILE, CURVE, SIZES = range(6)


def ignore(*_, **__):
    pass


@pytest.fixture
def jobs(tmp_path):
    (tmp_path / "work").mkdir(exist_ok=True)
    return page._Jobs(Settings(tmp_path / "work", 10**8, allows_paths=True))


@pytest.fixture
def public(tmp_path):
    (tmp_path / "work").mkdir(exist_ok=True)
    return page._Jobs(Settings(tmp_path / "work", 10**4))


def analysed(jobs, *, uploads=(), names="", same_base=False, session=None):
    return jobs.analyse([str(path) for path in uploads], names, same_base, session, ignore)


def test_from_a_zip_file_to_a_pack(jobs, archive, tmp_path):
    shown = analysed(jobs, uploads=[archive])
    session = shown[SESSION]
    with open(shown[REPORT_FILE], encoding="utf-8") as file:
        document = file.read()
    assert session.analysis.report.verdict.headline in html.unescape(document)
    assert html.escape(document) in shown[REPORT]
    assert shown[SIZES].value == 0.1
    assert 'data-point="2" class="chosen"' in shown[CURVE]
    assert 'data-point="4" class="chosen"' in jobs.draw(0.2, session)
    text, button = jobs.make(0.2, session, ignore)
    assert "The pack of 4 adapters takes" in text
    shutil.unpack_archive(button.value["path"] if isinstance(button.value, dict) else button.value, tmp_path / "out")
    assert len(ex.Pack.open(tmp_path / "out/pack")) == 4


def test_folders_of_a_session_are_removed_with_it(jobs, archive, adapters, tmp_path):
    first = analysed(jobs, uploads=[archive])[SESSION]
    second = analysed(jobs, names=str(adapters), session=first)[SESSION]
    assert os.listdir(tmp_path / "work") == [second.folder.name]
    with pytest.raises(gradio.Error):
        analysed(jobs, names="nowhere", session=second)
    assert os.listdir(tmp_path / "work") == [second.folder.name]
    page._remove(second)
    assert os.listdir(tmp_path / "work") == []


def refused(call):
    """Return the text of the error that the page shows."""
    with pytest.raises(gradio.Error) as caught:
        call()
    assert not caught.value.print_exception
    return html.unescape(caught.value.message)


class TestErrorsAreSentences:
    def test_nothing_passed(self, jobs):
        assert refused(lambda: analysed(jobs)).startswith("No adapter was passed.")

    def test_damaged_adapters_are_named_without_the_folders_of_the_server(self, jobs, tmp_path):
        folder = make_adapter(tmp_path / "in/bad", seed=1)
        (folder / "adapter_model.safetensors").write_bytes(b"\xff" * 40)
        archive = shutil.make_archive(str(tmp_path / "bad"), "zip", tmp_path, "in")
        message = refused(lambda: analysed(jobs, uploads=[archive]))
        # below the zip file's only folder
        assert message.startswith("bad/in/bad/adapter_model.safetensors is not a valid safetensors file")
        assert str(tmp_path) not in message

    def test_markup_in_names_is_text(self, jobs):
        with pytest.raises(gradio.Error) as caught:
            analysed(jobs, names="<img src=x onerror=alert(1)>")
        assert "<img" not in caught.value.message
        assert "&lt;img" in caught.value.message

    def test_other_base_models_until_they_are_one(self, jobs, tmp_path):
        make_adapter(tmp_path / "in/a", seed=1, base="org/base")
        make_adapter(tmp_path / "in/b", seed=2, base="org/other")
        assert "org/other" in refused(lambda: analysed(jobs, names=str(tmp_path / "in")))
        assert analysed(jobs, names=str(tmp_path / "in"), same_base=True)[SESSION] is not None

    def test_an_upload_that_is_too_large(self, public, archive):
        assert "--max-upload" in refused(lambda: analysed(public, uploads=[archive]))

    def test_a_session_that_has_ended(self, jobs):
        assert "Analyse them again" in refused(lambda: jobs.make(0.1, None, ignore))
        assert jobs.draw(0.1, None) == ""

    def test_an_error_bound_of_another_program(self, jobs, adapters):
        session = analysed(jobs, names=str(adapters))[SESSION]
        assert "max_error" in refused(lambda: jobs.make(1.5, session, ignore))

    def test_errors_of_the_system(self, jobs, archive, monkeypatch):
        def full(*_):
            raise OSError(28, "No space left on device", "/tmp/x/file")

        monkeypatch.setattr(inputs, "unpack", full)
        assert refused(lambda: analysed(jobs, uploads=[archive])) == "No space left on device: /tmp/x/file."


def test_visitors_read_neither_folders_nor_private_repositories(public, adapters, tmp_path):
    assert "reads no folders" in refused(lambda: analysed(public, names=str(adapters)))
    collection = public._collection([], "org/name", False, tmp_path)
    assert (collection.sources, collection.reading) == (["org/name"], {"token": False})


def test_messages_are_text(public, jobs, tmp_path):
    uploaded = f"{tmp_path}/work/abc/0/mine/a <b>\n/home/me/x"
    assert page._shown(uploaded, jobs._settings) == r"mine/a &lt;b&gt;\n/home/me/x"
    assert page._shown(uploaded, public._settings) == r"mine/a &lt;b&gt;\nx"
    assert page._listing([]) == ""
    assert page._listing(["a", "b"]) == "<ul><li>a</li><li>b</li></ul>"


@pytest.mark.parametrize(
    ("host", "space", "private"),
    [("127.0.0.1", None, True), ("localhost", None, True), ("0.0.0.0", None, False), ("127.0.0.1", "a/b", False)],
)
def test_who_reaches_a_host(monkeypatch, host, space, private):
    monkeypatch.delenv("SPACE_ID", raising=False)
    if space:
        monkeypatch.setenv("SPACE_ID", space)
    assert is_private(host) == private
