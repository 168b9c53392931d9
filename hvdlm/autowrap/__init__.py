"""Zero-edit: recognises what a script makes, as it makes it, and has it distributed as ``hvdlm.wrap`` would."""
