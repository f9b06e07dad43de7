"""Our member of `peft.PeftType`, which PEFT's files do not have."""

from typing import Any

from ..core import keys


def peft_type() -> Any:
    """Our member of `peft.PeftType`, made on the first call."""
    from peft.utils.peft_types import PeftType

    members: dict[str, Any] = PeftType._member_map_
    if keys.PEFT_TYPE not in members:
        member = str.__new__(PeftType, keys.PEFT_TYPE)
        member._name_ = member._value_ = keys.PEFT_TYPE
        member._sort_order_ = len(members)
        PeftType._member_names_.append(keys.PEFT_TYPE)
        PeftType._value2member_map_[keys.PEFT_TYPE] = member
        members[keys.PEFT_TYPE] = member
        # from Python 3.12 on, attributes are not looked up in the table of members
        type.__setattr__(PeftType, keys.PEFT_TYPE, member)
    return members[keys.PEFT_TYPE]
