"""Adapters that plug vkernels into other people's models. One room per host library."""
