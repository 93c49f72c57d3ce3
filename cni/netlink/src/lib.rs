//! Typed, synchronous rtnetlink, network namespaces and the masquerade rule: the only crate that speaks netlink.
//!
//! A [`Netlink`] belongs to the network namespace that its thread was in when it was opened, and may then be used from
//! any thread. Every call waits for the kernel's answer; none takes longer than the kernel takes to answer.
#![expect(
    clippy::wildcard_enum_match_arm,
    reason = "the kernel's messages have dozens of kinds and attributes, and gain more; what isn't ours is passed over"
)]

mod address;
mod batch;
pub mod diag;
mod error;
mod event;
mod filter;
#[doc(hidden)]
pub mod fuzz;
pub mod guard;
pub mod hostport;
mod link;
mod lookup;
pub mod masquerade;
pub mod namespace;
mod neighbour;
mod nft;
mod offload;
mod route;
mod shaping;
mod socket;
pub mod sysctl;
mod unlink;

pub use address::Address;
pub use batch::Batch;
pub use error::{Class, Error};
pub use event::{Event, Events, NeighbourChange};
pub use filter::{Direction, FilterPlace};
pub use link::{Link, LinkChange, VethEnd, Vxlan};
pub use lookup::Destined;
pub use neighbour::{FdbEntry, Neighbour};
pub use offload::{Features, Offloads};
pub use route::Route;
pub use shaping::Shape;
pub use socket::Netlink;

/// A hardware address of Ethernet.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Mac(pub [u8; 6]);

impl std::fmt::Display for Mac {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let [a, b, c, d, e, g] = self.0;
        write!(f, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")
    }
}
