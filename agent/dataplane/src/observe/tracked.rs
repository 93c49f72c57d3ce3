//! Flows that the programs at the pods' edges remember: those of pods that policies are about, be they on trial.

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::path::Path;

use serde::{Deserialize, Serialize};
use weft_ebpf_abi::policy::{
    POLICY_DRY_EGRESS, POLICY_DRY_INGRESS, PolicyPod, TRACK_FRAGMENTS, TRACK_IN, TrackKey, TrackValue,
};
use weft_ebpf_abi::{FlowKey, FlowValue, Port, names};

use super::ObserveError;
use super::pinned::PinnedMap;
use super::wire::Protocol;
use crate::sys;
use crate::why::policy::PolicyWay;

/// The least port that a client gets by itself (net.ipv4.ip_local_port_range).
const FIRST_CLIENT_PORT: u16 = 32_768;

/// A flow, without the client's port.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct TrackedFlow {
    /// Out of the pod, or into it.
    pub way: PolicyWay,
    /// The pod's address.
    pub pod: IpAddr,
    /// The other end's; of what the node translates, the client's own.
    pub peer: IpAddr,
    /// The server's port.
    pub port: u16,
    /// The protocol.
    pub protocol: Protocol,
}

/// What a node remembers.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Tracked {
    /// How many pods have policies on trial both ways.
    pub on_trial: usize,
    /// The flows, sorted.
    pub flows: Vec<TrackedFlow>,
}

/// Reads the flows that were used in the last seconds.
pub(crate) fn read(pins: &Path, within_seconds: u32) -> Result<Tracked, ObserveError> {
    const TRIAL: u32 = POLICY_DRY_INGRESS | POLICY_DRY_EGRESS;
    let pods = PinnedMap::open::<u32, PolicyPod>(pins, names::POLICY_PODS)?;
    let pods: Vec<(u32, PolicyPod)> = pods.dump()?;
    let translated = PinnedMap::open::<FlowKey, FlowValue>(pins, names::FLOWS)?;
    let tracked: Vec<(TrackKey, TrackValue)> =
        PinnedMap::open::<TrackKey, TrackValue>(pins, names::TRACKED)?.dump()?;
    let now = sys::monotonic_seconds();
    let mut flows = BTreeSet::new();
    for (key, value) in tracked {
        if now.saturating_sub(value.last_seen) > within_seconds || key.way & TRACK_FRAGMENTS != 0 {
            continue;
        }
        let client = if key.way == TRACK_IN { translated.get(&answer_of(&key))? } else { None };
        let client: Option<FlowValue> = client;
        flows.extend(flow(&key, client.map(|flow| IpAddr::from(flow.destination))));
    }
    let on_trial = pods.iter().filter(|(_, pod)| pod.flags & TRIAL == TRIAL).count();
    Ok(Tracked { on_trial, flows: flows.into_iter().collect() })
}

/// How the node's translation knows a flow that it sent to a pod: by the pod's answer.
fn answer_of(key: &TrackKey) -> FlowKey {
    FlowKey {
        source: key.destination,
        destination: key.source,
        source_port: key.destination_port,
        destination_port: key.source_port,
        protocol: key.protocol,
        pad: [0; 3],
    }
}

/// A flow that began before it was tracked may be known by an answer: then a client's port is where the server's should be.
fn flow(key: &TrackKey, client: Option<IpAddr>) -> Option<TrackedFlow> {
    let protocol = Protocol::from_number(key.protocol)?;
    let (source, destination) = (IpAddr::from(key.source), IpAddr::from(key.destination));
    let (from, to) = (key.source_port.get(), key.destination_port.get());
    let into = key.way == TRACK_IN;
    let (pod, peer) = if into { (destination, source) } else { (source, destination) };
    let answers = to >= FIRST_CLIENT_PORT && from < FIRST_CLIENT_PORT && key.source_port != Port::new(0);
    let (way, port) = match into != answers {
        true => (PolicyWay::Ingress, if answers { from } else { to }),
        false => (PolicyWay::Egress, if answers { from } else { to }),
    };
    let peer = client.unwrap_or(peer);
    (pod != peer).then_some(TrackedFlow { way, pod, peer, port, protocol })
}

#[cfg(test)]
mod tests {
    use weft_ebpf_abi::policy::TRACK_OUT;
    use weft_ebpf_abi::{Address, TCP};

    use super::*;

    fn key(from: (&str, u16), to: (&str, u16), way: u8) -> TrackKey {
        let address = |text: &str| Address::from(text.parse::<IpAddr>().unwrap());
        TrackKey {
            source: address(from.0),
            destination: address(to.0),
            source_port: Port::new(from.1),
            destination_port: Port::new(to.1),
            ifindex: 7,
            protocol: TCP,
            way,
            pad: [0; 2],
        }
    }

    fn is(key: &TrackKey, client: Option<&str>) -> Option<String> {
        let flow = flow(key, client.map(|client| client.parse().unwrap()))?;
        Some(format!("{:?} {} {} {}", flow.way, flow.pod, flow.peer, flow.port))
    }

    #[test]
    fn a_flow_is_told_from_the_side_of_its_pod() {
        let (pod, other) = ("10.42.0.7", "10.42.1.9");
        let out = key((pod, 40_000), (other, 80), TRACK_OUT);
        assert_eq!(is(&out, None).unwrap(), "Egress 10.42.0.7 10.42.1.9 80");
        let into = key((other, 40_000), (pod, 80), TRACK_IN);
        assert_eq!(is(&into, None).unwrap(), "Ingress 10.42.0.7 10.42.1.9 80");
        assert_eq!(is(&into, Some("192.0.2.1")).unwrap(), "Ingress 10.42.0.7 192.0.2.1 80");
        assert_eq!(is(&into, Some(pod)), None, "a pod that reaches itself");
        // The answers of connections that stood before.
        let answer = key((pod, 80), (other, 40_000), TRACK_OUT);
        assert_eq!(is(&answer, None).unwrap(), "Ingress 10.42.0.7 10.42.1.9 80");
        let answer = key((other, 80), (pod, 40_000), TRACK_IN);
        assert_eq!(is(&answer, None).unwrap(), "Egress 10.42.0.7 10.42.1.9 80");
    }
}
