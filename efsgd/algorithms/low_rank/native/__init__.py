"""PowerSGD's passes over memory in C++, for CPUs; see `passes.cpp`."""
