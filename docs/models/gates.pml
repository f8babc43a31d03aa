/* gates.pml: the four gates under leader change, crash, truncation and overwrite of queued
 * entries, and instance restart; groups of three, two or one voter with learners (INITCFG). */
#include "core.pml"
#define PROPOSALS(s)	:: d_step { canAppend(s) -> append(s, 0) }
#include "server.pml"
