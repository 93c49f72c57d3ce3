//! The tables of policy.

use weft_ebpf_abi::names;

use crate::maps::Kind;

/// A map that the planner of policies keeps.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum PolicyTable {
    /// What holds for a pod.
    Pods,
    /// Identities of pods' addresses.
    Identities,
    /// Identities of ranges.
    Ranges,
    /// Rules.
    Rules,
}

impl PolicyTable {
    /// All of them.
    pub const ALL: [Self; 4] = [Self::Pods, Self::Identities, Self::Ranges, Self::Rules];
}

impl Kind for PolicyTable {
    fn name(self) -> &'static str {
        match self {
            Self::Pods => names::POLICY_PODS,
            Self::Identities => names::IDENTITIES,
            Self::Ranges => names::RANGES,
            Self::Rules => names::RULES,
        }
    }
}
