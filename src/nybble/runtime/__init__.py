"""How a kernel gets from a ``.cu`` file to the GPU: source, build, plan, launch; and what hardware there is."""
