//! What is counted of each Service.

use core::mem::size_of;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// Connections and flows that got a backend.
pub const CONNECTIONS: u32 = 0;
/// Connections that got a backend and failed; counted where they are watched
/// ([`SERVICE_WATCHED`](crate::SERVICE_WATCHED)).
pub const FAILED: u32 = 1 << 16;

/// A list of backends, and what is counted of it.
#[derive(
    Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, FromBytes, IntoBytes, Immutable, KnownLayout,
)]
#[repr(C)]
pub struct CountKey {
    /// The list.
    pub list: u32,
    /// [`CONNECTIONS`], [`FAILED`], or the number of a [`DropReason`](crate::DropReason): what was turned away.
    pub what: u32,
}
const _: () = assert!(size_of::<CountKey>() == 8);
