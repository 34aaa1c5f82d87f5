"""The configuration: `spec` defines every knob, `load` reads it from YAML and says where it is wrong."""
