//! What a pod's NetworkPolicies say of a connection: the programs' own lookups, on the live maps.

use std::cell::RefCell;
use std::net::IpAddr;
use std::path::Path;

use serde::{Deserialize, Serialize};
use weft_ebpf_abi::policy::{
    IDENTITY_NONE, POLICY_EGRESS, POLICY_INGRESS, PolicyPod, RULE_BITS_PORT, RangeKey, RuleData, RuleKey,
    TrackKey, TrackValue,
};
use weft_ebpf_abi::{Address, Port, names};
use weft_ebpf_logic::policy::{PolicyTables, rule};

use crate::observe::ObserveError;
use crate::observe::pinned::PinnedMap;
use crate::observe::wire::Protocol;
use crate::sys;

/// Bits of a whole address.
const ADDRESS_BITS: u32 = 128;

/// Which way a connection crosses a pod's edge.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum PolicyWay {
    /// Out of the pod.
    Egress,
    /// Into the pod.
    Ingress,
}

/// A question about a connection at a pod's edge.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct PolicyQuery {
    /// The pod.
    pub pod_uid: String,
    /// Which way.
    pub way: PolicyWay,
    /// Whom with.
    pub peer: IpAddr,
    /// The port that is asked for.
    pub port: u16,
    /// The protocol.
    pub protocol: Protocol,
}

/// What the pod's edge does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum PolicyVerdict {
    /// No policy restricts the pod this way.
    Free,
    /// A rule covers it.
    Allowed,
    /// Policies restrict the pod, and no rule covers it.
    Denied,
    /// The pod has no process, or no device.
    Unknown,
}

/// The maps of policies, opened for reading.
struct PinnedPolicy {
    identities: PinnedMap,
    ranges: PinnedMap,
    rules: PinnedMap,
    failed: RefCell<Option<ObserveError>>,
}

impl PinnedPolicy {
    fn note<T>(&self, outcome: Result<Option<T>, ObserveError>) -> Option<T> {
        outcome.unwrap_or_else(|error| {
            self.failed.borrow_mut().get_or_insert(error);
            None
        })
    }
}

impl PolicyTables for PinnedPolicy {
    fn identity(&self, address: &Address) -> u64 {
        if let Some(identity) = self.note(self.identities.get::<_, u64>(address)) {
            return identity;
        }
        let key = RangeKey { prefix_bits: ADDRESS_BITS, address: *address };
        self.note(self.ranges.get::<_, u64>(&key)).unwrap_or(IDENTITY_NONE)
    }

    fn allows(&self, set: u64, identity: u64, protocol: u8, port: Port) -> bool {
        let data =
            RuleData { set: set.to_be_bytes(), identity: identity.to_be_bytes(), protocol, pad: 0, port };
        self.note(self.rules.get::<_, u32>(&RuleKey { prefix_bits: RULE_BITS_PORT, data })).is_some()
    }

    /// A question is about a new connection: it answers nothing.
    fn tracked(&self, _: &TrackKey) -> Option<TrackValue> {
        None
    }

    /// A question changes nothing.
    fn track(&self, _: &TrackKey, _: &TrackValue) {}

    fn would_drop(&self, _: u64) {}

    fn now(&self) -> u32 {
        sys::monotonic_seconds()
    }
}

/// Answers for the pod behind these devices (one, unless it has several networks).
pub(crate) fn ask(pins: &Path, devices: &[u32], query: &PolicyQuery) -> Result<PolicyVerdict, ObserveError> {
    let pods = PinnedMap::open::<u32, PolicyPod>(pins, names::POLICY_PODS)?;
    let tables = PinnedPolicy {
        identities: PinnedMap::open::<Address, u64>(pins, names::IDENTITIES)?,
        ranges: PinnedMap::open::<RangeKey, u64>(pins, names::RANGES)?,
        rules: PinnedMap::open::<RuleKey, u32>(pins, names::RULES)?,
        failed: RefCell::new(None),
    };
    let mut verdict = if devices.is_empty() { PolicyVerdict::Unknown } else { PolicyVerdict::Free };
    for device in devices {
        if let Some(pod) = pods.get::<_, PolicyPod>(device)? {
            verdict = judge(&tables, &pod, query);
        }
    }
    tables.failed.take().map_or(Ok(verdict), Err)
}

fn judge<T: PolicyTables>(tables: &T, pod: &PolicyPod, query: &PolicyQuery) -> PolicyVerdict {
    let (flag, set) = match query.way {
        PolicyWay::Egress => (POLICY_EGRESS, pod.egress),
        PolicyWay::Ingress => (POLICY_INGRESS, pod.ingress),
    };
    if pod.flags & flag == 0 {
        return PolicyVerdict::Free;
    }
    let peer = Address::from(query.peer);
    match rule(tables, set, &peer, query.protocol.number(), Port::new(query.port)) {
        true => PolicyVerdict::Allowed,
        false => PolicyVerdict::Denied,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Everybody may come to set 1, nobody to another.
    struct Rules;

    impl PolicyTables for Rules {
        fn identity(&self, _: &Address) -> u64 {
            IDENTITY_NONE
        }
        fn allows(&self, set: u64, _: u64, _: u8, port: Port) -> bool {
            set == 1 && port.get() == 80
        }
        fn tracked(&self, _: &TrackKey) -> Option<TrackValue> {
            None
        }
        fn track(&self, _: &TrackKey, _: &TrackValue) {}
        fn would_drop(&self, _: u64) {}
        fn now(&self) -> u32 {
            0
        }
    }

    #[test]
    fn a_pod_is_free_the_way_that_no_policy_restricts() {
        let pod = PolicyPod { ingress: 1, egress: 2, flags: POLICY_INGRESS, ..PolicyPod::default() };
        let ask = |way, port| {
            let peer = IpAddr::from([10, 42, 0, 9]);
            let query = PolicyQuery { pod_uid: String::new(), way, peer, port, protocol: Protocol::Tcp };
            judge(&Rules, &pod, &query)
        };
        assert_eq!(ask(PolicyWay::Egress, 80), PolicyVerdict::Free);
        assert_eq!(ask(PolicyWay::Ingress, 80), PolicyVerdict::Allowed);
        assert_eq!(ask(PolicyWay::Ingress, 81), PolicyVerdict::Denied);
    }
}
