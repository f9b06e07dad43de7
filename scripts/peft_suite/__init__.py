"""PEFT's own tests, pointed at our tuner. `../peft-suite` runs them; nothing here is part of the package."""
