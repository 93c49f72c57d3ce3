//! Flows that the programs at the pods' edges remember: those of pods that policies are about, be they on trial.

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::path::Path;

use serde::{Deserialize, Serialize};
use weft_ebpf_abi::policy::{
    POLICY_DRY_EGRESS, POLICY_DRY_INGRESS, PolicyPod, TRACK_FRAGMENTS, TRACK_IN, TrackKey, TrackValue,
};
use weft_ebpf_abi::{Address, FlowKey, FlowValue, names, sizes};

use super::ObserveError;
use super::pinned::PinnedMap;
use super::wire::Protocol;
use crate::sys;
use crate::why::policy::PolicyWay;

/// The least port that a client gets by itself (net.ipv4.ip_local_port_range).
const FIRST_CLIENT_PORT: u16 = 32_768;
/// The table forgets the oldest flow a little before it is full: each CPU holds some places back.
const FULL: usize = sizes::TRACKED as usize / 8 * 7;

/// A flow, without the client's port.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct TrackedFlow {
    /// Out of the pod, or into it.
    pub way: PolicyWay,
    /// The pod's address.
    pub pod: IpAddr,
    /// The other end's: the client's own, and the backend's, where the node translates.
    pub peer: IpAddr,
    /// The other end is the node itself. It reaches its pods and they it, whatever policies say.
    pub peer_is_node: bool,
    /// The server's port.
    pub port: u16,
    /// The protocol.
    pub protocol: Protocol,
}

/// What a node remembers.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Tracked {
    /// The flows, sorted.
    pub flows: Vec<TrackedFlow>,
    /// It can't remember more, and so has forgotten some.
    pub full: bool,
}

/// The devices of pods that have policies on trial both ways.
pub(crate) fn on_trial(pins: &Path) -> Result<BTreeSet<u32>, ObserveError> {
    const TRIAL: u32 = POLICY_DRY_INGRESS | POLICY_DRY_EGRESS;
    let pods: Vec<(u32, PolicyPod)> = PinnedMap::open::<u32, PolicyPod>(pins, names::POLICY_PODS)?.dump()?;
    Ok(pods.into_iter().filter(|(_, pod)| pod.flags & TRIAL == TRIAL).map(|(device, _)| device).collect())
}

/// Reads the flows that were used in the last seconds.
pub(crate) fn read(pins: &Path, within_seconds: u32) -> Result<Tracked, ObserveError> {
    let own: Vec<(Address, u32)> = PinnedMap::open::<Address, u32>(pins, names::NODE_ADDRESSES)?.dump()?;
    let own: BTreeSet<IpAddr> = own.into_iter().map(|(address, _)| address.into()).collect();
    let translated = PinnedMap::open::<FlowKey, FlowValue>(pins, names::FLOWS)?;
    let tracked: Vec<(TrackKey, TrackValue)> =
        PinnedMap::open::<TrackKey, TrackValue>(pins, names::TRACKED)?.dump()?;
    let full = tracked.len() >= FULL;
    let now = sys::monotonic_seconds();
    let mut flows = BTreeSet::new();
    for (key, value) in tracked {
        if now.saturating_sub(value.last_seen) > within_seconds || key.way & TRACK_FRAGMENTS != 0 {
            continue;
        }
        let outward = outward(&key);
        flows.extend(flow(&key, &outward, translated.get(&outward)?, &own));
    }
    Ok(Tracked { flows: flows.into_iter().collect(), full })
}

/// The pod's packets of a flow, as the node's translation knows them.
fn outward(key: &TrackKey) -> FlowKey {
    let (protocol, pad) = (key.protocol, [0; 3]);
    if key.way == TRACK_IN {
        FlowKey {
            source: key.destination,
            destination: key.source,
            source_port: key.destination_port,
            destination_port: key.source_port,
            protocol,
            pad,
        }
    } else {
        FlowKey {
            source: key.source,
            destination: key.destination,
            source_port: key.source_port,
            destination_port: key.destination_port,
            protocol,
            pad,
        }
    }
}

/// A flow that began before it was tracked may be known by an answer: then a client's port is where the server's should be.
fn flow(
    key: &TrackKey,
    outward: &FlowKey,
    becomes: Option<FlowValue>,
    own: &BTreeSet<IpAddr>,
) -> Option<TrackedFlow> {
    let protocol = Protocol::from_number(key.protocol)?;
    let (from, to) = (key.source_port.get(), key.destination_port.get());
    let answers = to >= FIRST_CLIENT_PORT && (1..FIRST_CLIENT_PORT).contains(&from);
    let into = (key.way == TRACK_IN) != answers;
    let pod = IpAddr::from(outward.source);
    // What the pod's packets become names the other end: the client behind the node's address, the backend behind a Service's.
    let (peer, peer_port) = match becomes {
        Some(flow) => (IpAddr::from(flow.destination), flow.destination_port),
        None => (IpAddr::from(outward.destination), outward.destination_port),
    };
    let (way, port) = match into {
        true => (PolicyWay::Ingress, outward.source_port),
        false => (PolicyWay::Egress, peer_port),
    };
    let peer_is_node = own.contains(&peer);
    (pod != peer).then_some(TrackedFlow { way, pod, peer, peer_is_node, port: port.get(), protocol })
}

#[cfg(test)]
mod tests {
    use weft_ebpf_abi::policy::TRACK_OUT;
    use weft_ebpf_abi::{Port, TCP};

    use super::*;

    const POD: &str = "10.42.0.7";
    const OTHER: &str = "10.42.1.9";

    fn address(text: &str) -> Address {
        Address::from(text.parse::<IpAddr>().unwrap())
    }

    fn key(from: (&str, u16), to: (&str, u16), way: u8) -> TrackKey {
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

    /// What is told of a flow, the other end of which is translated to `becomes`.
    fn is(key: &TrackKey, becomes: Option<(&str, u16)>) -> Option<String> {
        let becomes = becomes.map(|(to, port)| FlowValue {
            source: key.source,
            destination: address(to),
            source_port: key.source_port,
            destination_port: Port::new(port),
            ifindex: 0,
            generation: 0,
            flags: 0,
            last_seen: 0,
        });
        let own = BTreeSet::from(["10.42.0.1".parse().unwrap()]);
        let flow = flow(key, &outward(key), becomes, &own)?;
        let node = if flow.peer_is_node { " node" } else { "" };
        Some(format!("{:?} {} {} {}{node}", flow.way, flow.pod, flow.peer, flow.port))
    }

    #[test]
    fn a_flow_is_told_from_the_side_of_its_pod() {
        let out = key((POD, 40_000), (OTHER, 80), TRACK_OUT);
        assert_eq!(is(&out, None).unwrap(), "Egress 10.42.0.7 10.42.1.9 80");
        let into = key((OTHER, 40_000), (POD, 80), TRACK_IN);
        assert_eq!(is(&into, None).unwrap(), "Ingress 10.42.0.7 10.42.1.9 80");
        let probe = key(("10.42.0.1", 40_000), (POD, 80), TRACK_IN);
        assert_eq!(is(&probe, None).unwrap(), "Ingress 10.42.0.7 10.42.0.1 80 node");
        // A client that chose its port itself, and a server beyond the least client's port.
        let low = key((POD, 700), (OTHER, 2_049), TRACK_OUT);
        assert_eq!(is(&low, None).unwrap(), "Egress 10.42.0.7 10.42.1.9 2049");
        let high = key((OTHER, 40_000), (POD, 50_051), TRACK_IN);
        assert_eq!(is(&high, None).unwrap(), "Ingress 10.42.0.7 10.42.1.9 50051");
    }

    #[test]
    fn a_flow_known_by_its_answers_is_the_same() {
        let answer = key((POD, 80), (OTHER, 40_000), TRACK_OUT);
        assert_eq!(is(&answer, None).unwrap(), "Ingress 10.42.0.7 10.42.1.9 80");
        let answer = key((OTHER, 80), (POD, 40_000), TRACK_IN);
        assert_eq!(is(&answer, None).unwrap(), "Egress 10.42.0.7 10.42.1.9 80");
    }

    #[test]
    fn what_the_node_translates_has_the_ends_that_it_knows() {
        let into = key(("10.42.0.1", 40_000), (POD, 80), TRACK_IN);
        assert_eq!(is(&into, Some(("192.0.2.1", 50_000))).unwrap(), "Ingress 10.42.0.7 192.0.2.1 80");
        assert_eq!(is(&into, Some((POD, 50_000))), None, "a pod that reaches itself");
        let to_service = key((POD, 40_000), ("10.43.0.5", 80), TRACK_OUT);
        assert_eq!(is(&to_service, Some((OTHER, 8_080))).unwrap(), "Egress 10.42.0.7 10.42.1.9 8080");
        // The answers that the same connection gets.
        let answer = key(("10.43.0.5", 80), (POD, 40_000), TRACK_IN);
        assert_eq!(is(&answer, Some((OTHER, 8_080))).unwrap(), "Egress 10.42.0.7 10.42.1.9 8080");
    }

    #[test]
    fn what_has_no_ports_is_no_flow_of_a_policy() {
        let ping = TrackKey { protocol: 1, ..key((POD, 7), (OTHER, 7), TRACK_OUT) };
        assert_eq!(is(&ping, None), None);
    }
}
