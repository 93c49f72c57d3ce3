//! The dataplane in a real kernel: sockets, packets and restarts, in network namespaces of their own.
#![expect(clippy::unwrap_used, reason = "also what tests share may fail the test")]

mod adoption;
mod agent;
mod bodies;
mod buffers;
mod card;
mod counts;
mod crossing;
mod direct;
mod edge;
mod ejection;
mod entries;
mod errors;
mod filters;
mod findings;
mod forged;
mod frames;
mod links;
mod native;
mod offload;
mod overlay;
mod packets;
mod paths;
mod place;
mod podedge;
mod policy;
mod sctp;
mod services;
mod sockets;
mod tunnels;
mod width;
mod xdp;

/// What every test here needs.
pub(crate) const NEEDS: [&str; 4] = ["root", "bpf", "ip", "artifacts"];
