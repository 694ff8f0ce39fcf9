"""One file per family; each has benches() -> list[Bench]. The rival is what a user would write without this library."""
