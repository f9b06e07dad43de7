"""The member of `peft.PeftType` for this method, which PEFT does not define."""

from typing import Any

from ..core import keys


def peft_type() -> Any:
    """Return the member of `peft.PeftType` for this method. It is added to the enumeration on the first call."""
    from peft.utils.peft_types import PeftType

    members: dict[str, Any] = PeftType._member_map_
    if keys.PEFT_TYPE not in members:
        member = str.__new__(PeftType, keys.PEFT_TYPE)
        member._name_ = member._value_ = keys.PEFT_TYPE
        member._sort_order_ = len(members)
        PeftType._member_names_.append(keys.PEFT_TYPE)
        PeftType._value2member_map_[keys.PEFT_TYPE] = member
        members[keys.PEFT_TYPE] = member
        # since Python 3.12, attribute access does not use the table of members
        type.__setattr__(PeftType, keys.PEFT_TYPE, member)
    return members[keys.PEFT_TYPE]
