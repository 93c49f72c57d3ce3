//! The dataplane in a real kernel: sockets, packets and restarts, in network namespaces of their own.

mod adoption;
mod edge;
mod overlay;
mod packets;
mod place;
mod sockets;

/// What every test here needs.
pub(crate) const NEEDS: [&str; 4] = ["root", "bpf", "ip", "artifacts"];
