"""Op sets: `reference` and `native` are modules with the same functions; a backend picks one."""
