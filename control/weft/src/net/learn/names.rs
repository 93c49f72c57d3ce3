//! From flows between addresses to flows of workloads.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::net::IpAddr;

use ipnetwork::IpNetwork;
use k8s_openapi::api::core::v1::{Node, Pod};
use kube::ResourceExt as _;
use weft_agent_dataplane::observe::tracked::TrackedFlow;

use super::plan::{self, Peer, Seen, Workload};
use crate::ranges;

/// Addresses at the start of a node's range of pods that are the node's own: the tunnel's and the bridge's.
const NODES_FIRST: u32 = 2;

/// Flows that wait, and addresses that are said to be nobody's, at most.
const MOST_UNNAMED: usize = 4_096;
/// Of those, how many are told.
const MOST_TOLD: usize = 3;

/// Whether a pod has a device of its own, at which flows are seen.
pub(super) fn has_own_edge(pod: &Pod) -> bool {
    let running = pod.status.as_ref().and_then(|status| status.phase.as_deref()) == Some("Running");
    running && !on_host(pod) && !addresses(pod).is_empty()
}

/// Who has which address, and what was seen of whom.
pub(super) struct Names {
    namespace: String,
    dns: Vec<IpAddr>,
    /// Addresses of pods and Services: who has one that nobody is known to have is not outside the cluster.
    inside: Vec<IpNetwork>,
    pods: HashMap<IpAddr, (Workload, String)>,
    nodes: BTreeSet<IpAddr>,
    /// Flows whose ends are to be known at the next look.
    waiting: BTreeSet<TrackedFlow>,
    seen: BTreeMap<Workload, plan::Flows>,
    flows: usize,
    unnamed: BTreeSet<IpAddr>,
    /// Pods without labels, which no selector can tell from others.
    bare: BTreeSet<String>,
    /// Pods of which the other end is allowed their whole namespace.
    bare_peers: BTreeSet<String>,
}

impl Names {
    /// Knows nobody. `inside` are the ranges of pods and Services.
    pub(super) fn new(namespace: &str, dns: Vec<IpAddr>, inside: Vec<IpNetwork>) -> Self {
        Self {
            namespace: namespace.to_owned(),
            dns,
            inside,
            pods: HashMap::new(),
            nodes: BTreeSet::new(),
            waiting: BTreeSet::new(),
            seen: BTreeMap::new(),
            flows: 0,
            unnamed: BTreeSet::new(),
            bare: BTreeSet::new(),
            bare_peers: BTreeSet::new(),
        }
    }

    /// Takes in who is there now. Who was there before is not forgotten until another has the address.
    pub(super) fn learn(&mut self, pods: &[Pod], nodes: &[Node]) {
        let phase = |pod: &Pod| pod.status.as_ref().and_then(|status| status.phase.clone());
        // What has ended keeps its address in the API, and may have given it to another.
        for pod in pods.iter().filter(|pod| phase(pod).as_deref() == Some("Running") && !on_host(pod)) {
            for address in addresses(pod) {
                self.pods.insert(address, (plan::workload(pod), pod.name_any()));
            }
        }
        let has_ended = |pod: &&Pod| matches!(phase(pod).as_deref(), Some("Succeeded" | "Failed"));
        let mut ended: Vec<&Pod> = pods.iter().filter(has_ended).filter(|pod| !on_host(pod)).collect();
        ended.sort_by_key(|pod| Reverse(pod.status.as_ref().and_then(|status| status.start_time.clone())));
        for pod in ended {
            for address in addresses(pod) {
                self.pods.entry(address).or_insert_with(|| (plan::workload(pod), pod.name_any()));
            }
        }
        self.nodes.extend(nodes.iter().flat_map(node_addresses));
    }

    /// Takes in flows. One with an end that is not known yet waits for the next ones.
    pub(super) fn name(&mut self, flows: Vec<TrackedFlow>) {
        let waited = std::mem::take(&mut self.waiting);
        let flows: BTreeSet<TrackedFlow> = flows.into_iter().filter(|flow| !waited.contains(flow)).collect();
        for flow in &waited {
            if let Err(address) = self.one(flow) {
                self.leave_out(address);
            }
        }
        for flow in flows {
            match self.one(&flow) {
                Ok(()) => {}
                Err(_) if self.waiting.len() < MOST_UNNAMED => drop(self.waiting.insert(flow)),
                Err(address) => self.leave_out(address),
            }
        }
    }

    /// Takes in that no flows follow.
    pub(super) fn finish(&mut self) {
        self.name(Vec::new());
    }

    fn leave_out(&mut self, address: IpAddr) {
        if self.unnamed.len() < MOST_UNNAMED {
            self.unnamed.insert(address);
        }
    }

    /// What was seen of each workload.
    pub(super) fn seen(&self) -> &BTreeMap<Workload, plan::Flows> {
        &self.seen
    }

    /// How many flows that is.
    pub(super) fn flows(&self) -> usize {
        self.flows
    }

    /// What the policies say too little or too much about.
    pub(super) fn notes(&self) -> Vec<String> {
        let bare = |name: &String| {
            format!(
                "pod {name} has no labels of its own: no policy can select it alone, and none is proposed for it"
            )
        };
        let peer = |name: &String| {
            format!("pod {name} has no labels of its own: who talks to it is allowed its whole namespace")
        };
        let mut notes: Vec<String> =
            self.bare.iter().map(bare).chain(self.bare_peers.iter().map(peer)).collect();
        if !self.unnamed.is_empty() {
            let told: Vec<String> = self.unnamed.iter().take(MOST_TOLD).map(IpAddr::to_string).collect();
            let others = if self.unnamed.len() > MOST_TOLD { ", …" } else { "" };
            let (count, told) = (self.unnamed.len(), told.join(", "));
            notes
                .push(format!("flows with {count} address(es) that no pod has are left out: {told}{others}"));
        }
        notes
    }

    /// Fails with the address that is nobody's.
    fn one(&mut self, flow: &TrackedFlow) -> Result<(), IpAddr> {
        let Some((subject, pod)) = self.pods.get(&flow.pod) else { return Err(flow.pod) };
        let is_dns = self.dns.contains(&flow.peer);
        if subject.namespace != self.namespace || (flow.peer_is_node && !is_dns) {
            return Ok(());
        }
        let peer = match self.pods.get(&flow.peer) {
            _ if is_dns => Peer::Dns(flow.peer),
            _ if self.nodes.contains(&flow.peer) => Peer::Address(flow.peer),
            Some((peer, name)) => {
                if peer.labels.is_empty() {
                    self.bare_peers.insert(format!("{}/{name}", peer.namespace));
                }
                Peer::Pods { namespace: peer.namespace.clone(), labels: peer.labels.clone() }
            }
            None if self.inside.iter().any(|range| range.contains(flow.peer)) => return Err(flow.peer),
            None => Peer::Address(flow.peer),
        };
        if subject.labels.is_empty() {
            self.bare.insert(format!("{}/{pod}", subject.namespace));
            return Ok(());
        }
        let seen = Seen { way: flow.way, peer, port: flow.port, protocol: flow.protocol };
        self.flows += usize::from(self.seen.entry(subject.clone()).or_default().insert(seen));
        Ok(())
    }
}

fn on_host(pod: &Pod) -> bool {
    pod.spec.as_ref().is_some_and(|spec| spec.host_network == Some(true))
}

fn addresses(pod: &Pod) -> Vec<IpAddr> {
    let ips = pod.status.iter().flat_map(|status| status.pod_ips.iter().flatten());
    ips.filter_map(|ip| ip.ip.parse().ok()).collect()
}

fn node_addresses(node: &Node) -> Vec<IpAddr> {
    let listed = node.status.iter().flat_map(|status| status.addresses.iter().flatten());
    let listed = listed.filter_map(|address| address.address.parse().ok());
    let ranges = node.spec.iter().flat_map(|spec| spec.pod_cidrs.iter().flatten());
    let ranges = ranges.filter_map(|range| range.parse::<IpNetwork>().ok());
    let own = ranges.flat_map(|range| (0..NODES_FIRST).map(move |by| ranges::nth(range, by)));
    listed.chain(own).collect()
}
