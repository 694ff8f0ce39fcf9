"""make gpu: what a machine with a CUDA GPU can say about this library, in one command and a fixed time.

__main__    the command: stages, time, exit status; imports neither torch nor vkernels
supervise   a stage as a process of its own, watched: a crash or a hang costs one case, not the run
worker      what runs in such a process and reports line by line
timing      how a call is timed        cases     what is raced, and the targets
rivals      against what               race      one case: correct first, then in turn
proof       every op against float64   report    the JSON and the table
preferences which of our backends was the faster, for the dispatcher
"""
