//! From flows between workloads to policies. Pure.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use anyhow::Context as _;
use k8s_openapi::api::core::v1::Pod;
use k8s_openapi::api::networking::v1::{
    IPBlock, NetworkPolicy, NetworkPolicyEgressRule, NetworkPolicyIngressRule, NetworkPolicyPeer,
    NetworkPolicyPort, NetworkPolicySpec,
};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{LabelSelector, ObjectMeta};
use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;
use kube::ResourceExt as _;
use weft_agent_dataplane::observe::wire::Protocol;
use weft_agent_dataplane::why::policy::PolicyWay;

/// Labels that controllers put on pods and that change with each of them, or each roll-out.
const UNSTABLE: [&str; 11] = [
    "pod-template-hash",
    "controller-revision-hash",
    "pod-template-generation",
    "controller-uid",
    "job-name",
    "batch.kubernetes.io/controller-uid",
    "batch.kubernetes.io/job-name",
    "batch.kubernetes.io/job-completion-index",
    "statefulset.kubernetes.io/pod-name",
    "apps.kubernetes.io/pod-index",
    "apps.kubernetes.io/pod-revision-hash",
];
/// More addresses than these outside the cluster, at the same ports, are anybody.
const MOST_ADDRESSES: usize = 8;
const NAMESPACE_LABEL: &str = "kubernetes.io/metadata.name";
const DNS_PORT: u16 = 53;
const PREFIX: &str = "learned-";
/// Of a DNS subdomain (RFC 1123).
const LONGEST_NAME: usize = 253;

type Labels = BTreeMap<String, String>;

/// What a pod is one of.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Workload {
    pub(super) namespace: String,
    /// The labels that all its pods have.
    pub(super) labels: Labels,
    /// Its name.
    pub(super) name: String,
}

/// The other end of a flow.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Peer {
    Pods { namespace: String, labels: Labels },
    Dns(IpAddr),
    Address(IpAddr),
    Anybody { v6: bool },
}

/// A flow of a workload.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Seen {
    pub(super) way: PolicyWay,
    pub(super) peer: Peer,
    pub(super) port: u16,
    pub(super) protocol: Protocol,
}

/// The flows of a workload, each once. However many addresses there are outside, few are kept.
#[derive(Clone, Debug, Default)]
pub(super) struct Flows(BTreeSet<Seen>);

impl Flows {
    /// Whether it is new.
    pub(super) fn insert(&mut self, seen: Seen) -> bool {
        let Peer::Address(address) = seen.peer else { return self.0.insert(seen) };
        let anybody = Seen { peer: Peer::Anybody { v6: address.is_ipv6() }, ..seen };
        if self.0.contains(&anybody) || !self.0.insert(seen) {
            return false;
        }
        let same = |known: &&Seen| {
            let outside = matches!(known.peer, Peer::Address(known) if known.is_ipv6() == address.is_ipv6());
            outside
                && (known.way, known.port, known.protocol) == (anybody.way, anybody.port, anybody.protocol)
        };
        let many: Vec<Seen> = self.0.iter().filter(same).cloned().collect();
        if many.len() > MOST_ADDRESSES {
            self.0.retain(|known| !many.contains(known));
            self.0.insert(anybody);
        }
        true
    }
}

type Ports = BTreeSet<(Protocol, u16)>;

/// The workload of a pod: by its stable labels, and named by its controller.
pub(super) fn workload(pod: &Pod) -> Workload {
    let labels = pod.labels();
    let stable = labels.iter().filter(|(key, _)| !UNSTABLE.contains(&key.as_str()));
    let controller = pod.owner_references().iter().find(|owner| owner.controller == Some(true));
    let name = controller.map_or_else(|| pod.name_any(), |owner| owner.name.clone());
    // A ReplicaSet's name is its Deployment's and the hash.
    let hash = labels.get("pod-template-hash").map(|hash| format!("-{hash}"));
    let name = hash.and_then(|hash| name.strip_suffix(&hash).map(str::to_owned)).unwrap_or(name);
    Workload {
        namespace: pod.namespace().unwrap_or_default(),
        labels: stable.map(|(key, value)| (key.clone(), value.clone())).collect(),
        name,
    }
}

/// A policy for each workload, which allows what was seen and nothing else.
pub(super) fn policies(seen: &BTreeMap<Workload, Flows>) -> Vec<NetworkPolicy> {
    // What has the same labels is selected together, by the name of the first.
    let mut all: BTreeMap<(&str, &Labels), (&str, BTreeSet<&Seen>)> = BTreeMap::new();
    for (workload, flows) in seen {
        let key = (workload.namespace.as_str(), &workload.labels);
        all.entry(key).or_insert_with(|| (&workload.name, BTreeSet::new())).1.extend(&flows.0);
    }
    let mut names = BTreeSet::new();
    let policy = |((namespace, labels), (name, flows))| {
        let name = free_name(&names, name);
        names.insert(name.clone());
        policy(namespace, &name, labels, &flows)
    };
    all.into_iter().map(policy).collect()
}

/// As they are written to files.
pub(super) fn render(policies: &[NetworkPolicy]) -> anyhow::Result<String> {
    let mut text = String::new();
    for policy in policies {
        text.push_str("---\n");
        text.push_str(&serde_saphyr::to_string(policy).context("cannot write a policy")?);
    }
    Ok(text)
}

/// A name that no other policy has.
fn free_name(taken: &BTreeSet<String>, workload: &str) -> String {
    let mut number = 1;
    loop {
        let end = if number == 1 { String::new() } else { format!("-{number}") };
        let room = LONGEST_NAME - PREFIX.len() - end.len();
        // Names of pods and controllers are ASCII. A cut one must not end in what a name can't end in.
        let start = workload.get(..room).unwrap_or(workload).trim_end_matches(['-', '.']);
        let name = format!("{PREFIX}{start}{end}");
        if !taken.contains(&name) {
            return name;
        }
        number += 1;
    }
}

fn policy(namespace: &str, name: &str, labels: &Labels, flows: &BTreeSet<&Seen>) -> NetworkPolicy {
    let rules = |way: PolicyWay| rules(flows.iter().copied().filter(|seen| seen.way == way));
    let written =
        |peers: BTreeSet<Peer>| peers.iter().flat_map(|peer| written(peer, namespace)).collect::<Vec<_>>();
    let ingress = rules(PolicyWay::Ingress).into_iter().map(|(ports, peers)| NetworkPolicyIngressRule {
        from: Some(written(peers)),
        ports: Some(ports.into_iter().map(port).collect()),
    });
    let egress = rules(PolicyWay::Egress).into_iter().map(|(ports, peers)| NetworkPolicyEgressRule {
        to: Some(written(peers)),
        ports: Some(ports.into_iter().map(port).collect()),
    });
    NetworkPolicy {
        metadata: ObjectMeta {
            name: Some(name.to_owned()),
            namespace: Some(namespace.to_owned()),
            ..ObjectMeta::default()
        },
        spec: Some(NetworkPolicySpec {
            pod_selector: Some(selector(labels.clone())),
            policy_types: Some(vec!["Ingress".to_owned(), "Egress".to_owned()]),
            ingress: Some(ingress.collect()),
            egress: Some(egress.collect()),
        }),
    }
}

/// Rules: peers with the same ports are together.
fn rules<'a>(flows: impl Iterator<Item = &'a Seen>) -> BTreeMap<Ports, BTreeSet<Peer>> {
    let mut ports: BTreeMap<Peer, Ports> = BTreeMap::new();
    for seen in flows {
        let of = ports.entry(seen.peer.clone()).or_default();
        of.insert((seen.protocol, seen.port));
        // Long answers come over TCP, some day.
        if matches!(seen.peer, Peer::Dns(_)) && seen.port == DNS_PORT {
            of.extend([(Protocol::Tcp, DNS_PORT), (Protocol::Udp, DNS_PORT)]);
        }
    }
    let mut rules: BTreeMap<Ports, BTreeSet<Peer>> = BTreeMap::new();
    for (peer, ports) in ports {
        rules.entry(ports).or_default().insert(peer);
    }
    rules
}

fn written(peer: &Peer, own: &str) -> Vec<NetworkPolicyPeer> {
    let pods = |namespace: &str, labels: Labels| NetworkPolicyPeer {
        pod_selector: Some(selector(labels)),
        namespace_selector: (namespace != own)
            .then(|| selector(BTreeMap::from([(NAMESPACE_LABEL.to_owned(), namespace.to_owned())]))),
        ip_block: None,
    };
    let block = |cidr: String| NetworkPolicyPeer {
        ip_block: Some(IPBlock { cidr, except: None }),
        ..NetworkPolicyPeer::default()
    };
    let whole = |address: &IpAddr| block(format!("{address}/{}", if address.is_ipv4() { 32 } else { 128 }));
    match peer {
        Peer::Pods { namespace, labels } => vec![pods(namespace, labels.clone())],
        // By its address, as a node answers it, and by its pods, as elsewhere.
        Peer::Dns(address) => {
            let labels = BTreeMap::from([("k8s-app".to_owned(), "kube-dns".to_owned())]);
            vec![pods("kube-system", labels), whole(address)]
        }
        Peer::Address(address) => vec![whole(address)],
        Peer::Anybody { v6 } => vec![block(if *v6 { "::/0" } else { "0.0.0.0/0" }.to_owned())],
    }
}

fn selector(labels: Labels) -> LabelSelector {
    LabelSelector { match_labels: (!labels.is_empty()).then_some(labels), match_expressions: None }
}

fn port((protocol, port): (Protocol, u16)) -> NetworkPolicyPort {
    NetworkPolicyPort {
        port: Some(IntOrString::Int(port.into())),
        protocol: Some(protocol.to_string()),
        end_port: None,
    }
}
