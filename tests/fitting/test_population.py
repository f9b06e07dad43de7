"""Populations: adapters of users, coded as changes from one common adapter and independent of each other."""

import shutil
from dataclasses import replace
from hashlib import sha256

import numpy as np
import pytest
import torch

import eigenlorax as ex
import reference
from adapters import make_adapter
from eigenlorax.errors import AdapterNameError, OptionError, PackDamagedError, ShapeError
from eigenlorax.pack import history_figures
from eigenlorax.pack.bundles import bundle
from planted import tree
from runs import make_run, tensors_of
from users import make_users

pytestmark = pytest.mark.usefixtures("module_without_shape_checks")

HEAD = "base_model.model.classifier.weight"


@pytest.fixture(scope="module")
def users(tmp_path_factory):
    return make_users(tmp_path_factory.mktemp("users"), ["ann", "bob", "cem", "dee"])


@pytest.fixture(scope="module")
def pack(users, tmp_path_factory):
    common, members = users
    return ex.fit(members, reference=common).save(tmp_path_factory.mktemp("pack") / "pack")


def updates(adapter):
    modules = adapter.modules
    return np.concatenate([reference.dense(modules[module]).ravel() for module in sorted(modules)])


def unbundled(record):
    """The record of a version without its position in a file."""
    return replace(record, bundle=None, offset=None)


def change_errors(pack, name, source):
    """Errors of the update and of the head against the source, relative to the change from the common adapter."""
    exact, stored, common = ex.read_adapter(source), pack[f"members@{name}"], pack["members@common"]
    update = [updates(adapter) for adapter in (exact, stored, common)]
    head = [adapter.heads[HEAD].double().numpy() for adapter in (exact, stored, common)]
    return [np.linalg.norm(b - a) / np.linalg.norm(c - a) for a, b, c in (update, head)]


class TestMembers:
    def test_refer_to_the_common_adapter_only(self, pack):
        history = ex.Pack.open(pack).histories["members"]
        assert history.labels == ["common", "ann", "bob", "cem", "dee"]
        assert [record.reference for record in history] == [None, *["common"] * 4]
        assert history.is_population

    @pytest.mark.parametrize(("options", "error", "head"), [({}, 0.2, 0.2), ({"max_error": 0.05}, 0.05, 0.1)])
    def test_are_within_the_bound_of_their_change(self, users, options, error, head):
        common, members = users
        pack = ex.fit(members, reference=common, **options)
        for name, source in members.items():
            record = pack.histories["members"][name]
            measured, of_head = change_errors(pack, name, source)
            assert error / 2 < measured <= error
            assert record.change_error == pytest.approx(measured, rel=1e-5)
            assert head / 2 < of_head <= head * (1 + 1e-9)
            exact = updates(ex.read_adapter(source))
            distance = np.linalg.norm(exact - updates(pack["members@common"]))
            assert record.max_error == pytest.approx(error * distance / np.linalg.norm(exact), rel=1e-6)
            assert record.change == pytest.approx(
                np.linalg.norm(updates(pack[f"members@{name}"]) - updates(pack["members@common"]))
                / np.linalg.norm(updates(pack["members@common"])),
                rel=0.1,
            )

    def test_take_fewer_bytes_than_each_by_itself(self, users, pack):
        _, members = users
        history = ex.Pack.open(pack).histories["members"]
        for name, source in members.items():
            alone = ex.Pack.empty().append(
                source, max_error=history[name].max_error, head_error=history[name].head_error
            )
            assert history[name].file_bytes < alone.file_bytes / 2

    def test_of_the_same_update_as_the_common_adapter_take_next_to_nothing(self, users):
        common, members = users
        pack = ex.fit({"same": common, "ann": members["ann"]}, reference=common)
        history = pack.histories["members"]
        assert history["same"].file_bytes < history["ann"].file_bytes / 2
        assert torch.equal(pack["members@same"].heads[HEAD], pack["members@common"].heads[HEAD])
        # it has no change to be relative to
        assert history_figures.figures(history).worst_change_error == history["ann"].change_error

    def test_that_were_not_trained_from_the_common_adapter_have_a_note(self, users, tmp_path):
        common, members = users
        apart = make_adapter(tmp_path / "eve", seed=9, head=(2, 31))
        assert ex.fit(members, reference=common).notes == []
        pack = ex.fit({**members, "eve": apart}, reference=common)
        exact, shared = updates(ex.read_adapter(apart)), updates(pack["members@common"])
        share = max(1 - float(np.sum((exact - shared) ** 2) / np.sum(exact**2)), 0.0)
        assert share < 0.5
        (note,) = pack.notes
        assert f"less than half of the squared norm of 1 of 5 adapters: eve ({share:.2f})." in note

    def test_do_not_depend_on_the_order_of_arguments(self, users, pack, tmp_path):
        common, members = users
        again = ex.fit(dict(reversed(members.items())), reference=common).save(tmp_path / "again")
        assert tree(again) == tree(pack)

    def test_do_not_depend_on_each_other(self, users, pack):
        common, members = users
        alone = ex.fit({"dee": members["dee"]}, reference=common).histories["members"]["dee"]
        assert unbundled(alone) == unbundled(ex.Pack.open(pack).histories["members"]["dee"])

    def test_are_verified_and_exported(self, users, pack, tmp_path):
        common, members = users
        opened = ex.Pack.open(pack)
        verification = ex.verify(opened, {"c": common, **members})
        assert verification.holds
        assert not verification.unknown
        paths = opened.export(tmp_path / "loras", ["members@bob"])
        exported = ex.read_adapter(paths["members@bob"])
        for key, tensor in tensors_of(opened["members@bob"]).items():
            assert torch.equal(tensors_of(exported)[key], tensor)

    def test_are_appended_with_the_same_bytes(self, users, pack, tmp_path):
        common, members = users
        appended = ex.fit({name: members[name] for name in ("ann", "bob", "cem")}, reference=common)
        appended.append(members["dee"], "dee", name="members")
        saved = ex.Pack.open(appended.save(tmp_path / "appended"))
        expected = ex.Pack.open(pack).histories["members"]
        assert [unbundled(each) for each in saved.histories["members"]] == [unbundled(each) for each in expected]
        assert len(list((tmp_path / "appended" / "versions").iterdir())) == 3
        assert appended.append(members["dee"], "dee2", name="members", reference="common").reference == "common"

    def test_that_the_common_adapter_cannot_predict_refer_to_nothing(self, users, monkeypatch):
        common, members = users
        pack = ex.fit({"ann": members["ann"]}, reference=common)
        readable = "eigenlorax.codec.versions.lossy._can_be_read"
        with monkeypatch.context() as patched:
            patched.setattr(readable, lambda encoded, reference: reference is None)
            alone = pack.append(members["bob"], "bob", name="members")
        assert (alone.reference, alone.change_error) == (None, None)
        assert pack.append(members["cem"], "cem", name="members").reference == "common"
        change = pack.histories["members"]["bob"].change
        pack.remove("members@ann")
        assert pack.histories["members"]["bob"].change == change

    def test_of_another_shape_are_refused(self, users, tmp_path):
        common, _ = users
        (other,) = make_run(tmp_path / "run", [1], seed=3, modules={"encoder.layer.0.key": (31, 37)})
        with pytest.raises(ShapeError, match=r"unlike version members@common .* It was not trained from this common"):
            ex.fit({"eve": other}, reference=common)

    @pytest.mark.parametrize(
        ("name", "message"), [("Common", "the name of the common adapter"), ("a" * 65, "64 letters")]
    )
    def test_have_names_that_are_labels(self, users, name, message):
        common, members = users
        with pytest.raises(AdapterNameError, match=message):
            ex.fit({name: members["ann"]}, reference=common)


class TestByteLimit:
    @pytest.mark.parametrize("limit", [200, 400])
    def test_is_kept_and_used(self, users, limit):
        common, members = users
        pack = ex.fit(members, reference=common, max_bytes_per_adapter=limit)
        for record in pack.histories["members"].versions[1:]:
            assert 0.9 * limit < record.file_bytes <= limit

    def test_below_what_is_possible_is_refused(self, users):
        common, members = users
        with pytest.raises(
            OptionError, match=r"takes \d+ bytes even at an error of 0.99 of its change, which exceeds 9 b"
        ):
            ex.fit(members, reference=common, max_bytes_per_adapter=9)

    def test_needs_a_reference_and_no_error(self, users):
        common, members = users
        with pytest.raises(OptionError, match="max_bytes chooses the error, and max_error was passed"):
            ex.Pack.empty().append(common, max_bytes=900, max_error=0.1)
        with pytest.raises(OptionError, match="max_bytes needs the version"):
            ex.Pack.empty().append(common, max_bytes=900)
        with pytest.raises(OptionError, match="max_bytes=0: it is a number of bytes, at least 1"):
            ex.Pack.empty().append(common, max_bytes=0)
        with pytest.raises(OptionError, match=r"max_bytes_per_adapter has no effect without a common adapter"):
            ex.fit(members, max_bytes_per_adapter=900)


@pytest.mark.parametrize(
    "options",
    [
        {"n_components": 2},
        {"purpose": "training"},
        {"ratio": 3},
        {"basis": 2},
        {"weighting": "factors"},
        {"dtype": "int8"},
    ],
)
def test_options_of_subspaces_are_refused(users, options):
    common, members = users
    with pytest.raises(OptionError, match=f"{next(iter(options))} has no effect on adapters that are coded as changes"):
        ex.fit(members, reference=common, **options)


class TestRemoval:
    def test_leaves_nothing_of_a_member(self, tmp_path):
        names = [f"user-{number:02}" for number in range(20)]
        common, members = make_users(tmp_path, names)
        pack = ex.Pack.empty()
        pack.append(common, "common", name="members", max_error=0.002, head_error=0.002)
        for name, source in members.items():
            pack.append(source, name, name="members", reference="common")
        pack.save(tmp_path / "pack")
        record = pack.histories["members"]["user-07"]
        data = pack.history_store.read(record)
        others = {name: tensors_of(pack[f"members@{name}"]) for name in names if name != "user-07"}
        with ex.Pack.edit(tmp_path / "pack") as edited:
            edited.remove("members@user-07")
        for path, content in tree(tmp_path / "pack").items():
            assert "user-07" not in str(path)
            for trace in (
                b"user-07",
                record.sha256.encode(),
                record.source_sha256.encode(),
                data[len(data) // 2 :][:32],
            ):
                assert trace not in content, path
        left = ex.Pack.open(tmp_path / "pack")
        for name, tensors in others.items():
            for key, tensor in tensors_of(left[f"members@{name}"]).items():
                assert torch.equal(tensor, tensors[key])

    def test_of_the_common_adapter_needs_that_of_all_members(self, pack, tmp_path):
        opened = ex.Pack.open(pack)
        with pytest.raises(OptionError, match="All other versions of 'members' refer to 'common'"):
            opened.remove("members@common")
        with pytest.raises(OptionError, match="there is nothing to prune"):
            opened.prune("members", keep_last=1)
        opened.remove("members@ann", "members@bob")
        opened.remove("members")
        assert not opened.histories

    def test_changes_no_record_of_another_member(self, pack):
        opened = ex.Pack.open(pack)
        before = opened.histories["members"]
        opened.remove("members@bob")
        left = [unbundled(each) for each in before if each.version != "bob"]
        assert [unbundled(each) for each in opened.histories["members"]] == left


class TestBundle:
    def test_has_all_members_in_one_file(self, pack):
        history = ex.Pack.open(pack).histories["members"]
        assert len(list((pack / "versions").iterdir())) == 2
        content = (pack / history["ann"].file).read_bytes()
        assert sha256(content).hexdigest() == history["ann"].bundle
        assert len(content) == sum(record.file_bytes for record in history.versions[1:])
        for record in history.versions[1:]:
            part = content[record.offset :][: record.file_bytes]
            assert sha256(part).hexdigest() == record.sha256

    def test_is_written_again_without_a_removed_member(self, pack, tmp_path):
        shutil.copytree(pack, tmp_path / "pack")
        before = ex.Pack.open(pack)
        removed = before.history_store.read(before.histories["members"]["bob"])
        with ex.Pack.edit(tmp_path / "pack") as edited:
            edited.remove("members@bob")
        for path, content in tree(tmp_path / "pack").items():
            assert b"bob" not in content
            assert removed[len(removed) // 2 :][:32] not in content, path
        after = ex.Pack.open(tmp_path / "pack")
        after.verify()
        assert len(list((tmp_path / "pack" / "versions").iterdir())) == 2
        for name in ("common", "ann", "cem", "dee"):
            for key, tensor in tensors_of(after[f"members@{name}"]).items():
                assert torch.equal(tensor, tensors_of(before[f"members@{name}"])[key])

    def test_is_written_again_without_one_of_two_equal_members(self, users, tmp_path):
        common, members = users
        pack = ex.fit({"ann": members["ann"], "bob": members["bob"], "twin": members["ann"]}, reference=common)
        pack.save(tmp_path / "pack")
        pack.remove("members@ann")
        pack.save()
        left = ex.Pack.open(tmp_path / "pack")
        left.verify()
        assert left.histories["members"].labels == ["common", "bob", "twin"]
        assert left.histories["members"]["twin"].offset == left.histories["members"]["bob"].file_bytes
        assert ex.verify(left, {"ann": members["ann"], "bob": members["bob"]}).holds

    def test_is_copied_with_the_pack(self, pack, tmp_path):
        assert tree(ex.Pack.open(pack).save(tmp_path / "copy")) == tree(pack)

    @pytest.mark.parametrize("damage", [lambda data: data[:-1], lambda data: data + b"x", lambda data: b"x" + data[1:]])
    def test_that_was_changed_is_noticed(self, pack, tmp_path, damage):
        shutil.copytree(pack, tmp_path / "pack")
        path = tmp_path / "pack" / ex.Pack.open(pack).histories["members"]["ann"].file
        path.write_bytes(damage(path.read_bytes()))
        with pytest.raises(PackDamagedError, match=path.name):
            ex.Pack.open(tmp_path / "pack").verify()

    def test_of_ten_thousand_members_is_opened(self, users, pack, tmp_path):
        opened = ex.Pack.open(pack)
        store, history = opened.history_store, opened.histories["members"]
        first = history["ann"]
        many = [replace(unbundled(first), version=f"user-{number}") for number in range(10_000)]
        common = history["common"]
        data = store.read(first)
        store.add_file(first, data)
        labels = {record.version for record in many}
        store.replace(bundle(store, replace(history, versions=(common, *many)), labels))
        saved = ex.Pack.open(opened.save(tmp_path / "many"))
        assert len(saved.histories["members"]) == 10_001
        assert len(list((tmp_path / "many" / "versions").iterdir())) == 2
        assert saved.history_store.read(saved.histories["members"]["user-9999"]) == data


class TestReferenceInAHistory:
    def test_may_be_any_earlier_version(self, tmp_path):
        checkpoints = make_run(tmp_path / "run", (1, 2, 3, 4))
        pack = ex.Pack.empty()
        for checkpoint in checkpoints[:3]:
            pack.append(checkpoint)
        record = pack.append(checkpoints[3], reference="1", max_error=0.1)
        assert (record.reference, record.change_error <= 0.1) == ("1", True)
        assert not pack.histories["run"].is_population
        pack = ex.Pack.open(pack.save(tmp_path / "pack"))
        expected = tensors_of(pack["run@4"])
        pack.remove("run@1")
        assert pack.histories["run"].latest.change_error is None
        for key, tensor in tensors_of(pack["run@4"]).items():
            assert torch.equal(tensor, expected[key])

    def test_is_of_the_same_kind(self, tmp_path):
        first, second = make_run(tmp_path / "run", (1, 2))
        pack = ex.Pack.empty()
        pack.append(first)
        with pytest.raises(OptionError, match="is stored within an error bound, so that a version bit for bit cannot"):
            pack.append(second, reference="1", lossless=True)
        with pytest.raises(AdapterNameError, match="no version '7' in the history 'run'"):
            pack.append(second, reference="7")

    def test_may_be_lossless(self, tmp_path):
        checkpoints = make_run(tmp_path / "run", (1, 2, 3))
        pack = ex.Pack.empty()
        for checkpoint in checkpoints[:2]:
            pack.append(checkpoint, lossless=True)
        record = pack.append(checkpoints[2], reference="1", lossless=True)
        assert (record.reference, record.change_error) == ("1", None)
        for key, tensor in tensors_of(pack["run@3"]).items():
            assert torch.equal(tensor, tensors_of(ex.read_adapter(checkpoints[2]))[key])
