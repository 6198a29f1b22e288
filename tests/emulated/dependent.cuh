// dependent.cuh of the emulator: one kernel at a time.
#pragma once
static void wait_for_previous() {}
static void allow_next() {}
static void prefetch_l2(const void*) {}
