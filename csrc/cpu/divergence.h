// Which instruction sets the CPU kernels can use here, and which they do. The kernels are in divergence_api.h.

#ifndef MEGATRON_TCOD_CPU_DIVERGENCE_H
#define MEGATRON_TCOD_CPU_DIVERGENCE_H

#include <string>
#include <vector>

std::vector<std::string> tcod_cpu_isas();             // those this machine runs, fastest first
std::string tcod_cpu_isa();                           // the one in use
bool tcod_cpu_select_isa(const std::string& name);    // false: unknown, or not on this machine

#endif
