"""Scripts as users of Opacus write them, each with data made up on the spot: `run(opacus, ...)` takes the library."""
