//! The masquerade rule: pods that leave the cluster do so with their node's address.
