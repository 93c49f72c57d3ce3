//! What the agent and a sandbox's `weft-init` share: the protocol on the init's socket, and control groups.

pub mod cgroup;
pub mod wire;
