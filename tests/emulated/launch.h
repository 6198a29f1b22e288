// What comes after the kernel's own text: run every cluster of a grid, one after the other. CALL is the kernel with its
// arguments taken from `argument`.
struct Argument {
    void* value;
    template <typename T> operator T*() const { return static_cast<T*>(value); }
};
static void** argument;
static void start() {
    CALL;
    self->done = moved = true;
    swapcontext(&self->context, &scheduler);
}

extern "C" void launch(const int* grid_size, int threads, int shared_bytes, int cluster_size, void** arguments) {
    argument = arguments;
    grid = {unsigned(grid_size[0]), unsigned(grid_size[1]), unsigned(grid_size[2])};
    for (unsigned z = 0; z < grid.z; ++z)
        for (unsigned y = 0; y < grid.y; ++y)
            for (unsigned first = 0; first < grid.x; first += cluster_size) {
                Cluster cluster;
                cluster.blocks.resize(cluster_size);
                cluster.threads = cluster_size * threads;
                std::vector<Fiber> fibers(cluster.threads);
                for (int i = 0; i < cluster.threads; ++i) {
                    Block& block = cluster.blocks[i / threads];
                    if (i % threads == 0) {
                        block.shared.assign(STATIC + shared_bytes, 0xff);  // NaN, whatever it is read as
                        block.warps.resize(threads / 32);
                        block.threads = threads, block.rank = i / threads, block.cluster = &cluster;
                    }
                    Fiber& fiber = fibers[i];
                    fiber.stack.resize(96 << 10);
                    fiber.thread = {unsigned(i % threads), 0, 0};
                    fiber.block_index = {first + i / threads, y, z};
                    fiber.block = &block, fiber.warp = i % threads / 32, fiber.lane = i % 32;
                    getcontext(&fiber.context);
                    fiber.context.uc_stack.ss_sp = fiber.stack.data();
                    fiber.context.uc_stack.ss_size = fiber.stack.size();
                    makecontext(&fiber.context, start, 0);
                }
                for (int left = cluster.threads; left > 0;) {
                    moved = false;
                    for (Fiber& fiber : fibers)
                        if (!fiber.done) {
                            self = &fiber;
                            swapcontext(&scheduler, &fiber.context);
                            left -= fiber.done;
                        }
                    if (!moved) fail("all threads wait for each other");
                }
            }
}
