//! Connections that fail, by backend: what the programs count for Services that opted in, and what the agent makes of it.

use core::mem::{offset_of, size_of};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// Connections that fail, without one that succeeds between them, after which the agent is told of a backend.
pub const FAILURES_IN_A_ROW: u32 = 5;

/// What is known of a backend whose connections are watched. The agent enters it; the programs count only where it is entered.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct Failures {
    /// Hash of the endpoint's uid: another pod on the same address begins anew.
    pub owner: u64,
    /// Connections that failed since the last that succeeded. Counted by the programs.
    pub failed: u32,
    /// How often it was ejected since the last that succeeded. Set by the agent, cleared by the programs.
    pub ejections: u32,
    /// Second of the monotonic clock at which it comes back; 0 if it is not ejected. The agent's.
    pub back_at: u32,
    /// Zero.
    pub pad: u32,
}
const _: () = assert!(size_of::<Failures>() == 24 && offset_of!(Failures, failed) == 8);
