//! From flows between workloads to policies. Pure.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

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

/// What a pod is one of.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Workload {
    pub(super) namespace: String,
    /// The labels that all its pods have.
    pub(super) labels: BTreeMap<String, String>,
    /// Its name.
    pub(super) name: String,
    /// The pod's name and node.
    pub(super) pod: String,
    pub(super) node: String,
    /// It has the addresses of its node.
    pub(super) on_host: bool,
}

/// The other end of a flow.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Peer {
    Pods { namespace: String, labels: BTreeMap<String, String> },
    Dns(IpAddr),
    Address(IpAddr),
    Anybody,
}

/// A flow of a workload.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Seen {
    pub(super) way: PolicyWay,
    pub(super) peer: Peer,
    pub(super) port: u16,
    pub(super) protocol: Protocol,
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
    let spec = pod.spec.as_ref();
    Workload {
        namespace: pod.namespace().unwrap_or_default(),
        labels: stable.map(|(key, value)| (key.clone(), value.clone())).collect(),
        name,
        pod: pod.name_any(),
        node: spec.and_then(|spec| spec.node_name.clone()).unwrap_or_default(),
        on_host: spec.is_some_and(|spec| spec.host_network == Some(true)),
    }
}

/// A policy for each workload, which allows what was seen and nothing else.
pub(super) fn policies(seen: &BTreeMap<Workload, BTreeSet<Seen>>) -> Vec<NetworkPolicy> {
    // What has the same labels is selected together.
    let mut all: BTreeMap<(&str, &BTreeMap<String, String>), (&str, BTreeSet<&Seen>)> = BTreeMap::new();
    for (workload, flows) in seen {
        let key = (workload.namespace.as_str(), &workload.labels);
        all.entry(key).or_insert_with(|| (&workload.name, BTreeSet::new())).1.extend(flows);
    }
    let mut names = BTreeMap::new();
    let policy = |((namespace, labels), (name, flows))| {
        let number: &mut usize = names.entry(name).or_default();
        *number += 1;
        let name = if *number == 1 { format!("learned-{name}") } else { format!("learned-{name}-{number}") };
        policy(namespace, &name, labels, &flows)
    };
    all.into_iter().map(policy).collect()
}

fn policy(
    namespace: &str,
    name: &str,
    labels: &BTreeMap<String, String>,
    flows: &BTreeSet<&Seen>,
) -> NetworkPolicy {
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
    for peers in rules.values_mut() {
        let outside = |peer: &Peer| matches!(peer, Peer::Address(_));
        if peers.iter().filter(|peer| outside(peer)).count() > MOST_ADDRESSES {
            peers.retain(|peer| !outside(peer));
            peers.insert(Peer::Anybody);
        }
    }
    rules
}

fn written(peer: &Peer, own: &str) -> Vec<NetworkPolicyPeer> {
    let pods = |namespace: &str, labels: BTreeMap<String, String>| NetworkPolicyPeer {
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
        Peer::Anybody => ["0.0.0.0/0", "::/0"].map(|cidr| block(cidr.to_owned())).into(),
    }
}

fn selector(labels: BTreeMap<String, String>) -> LabelSelector {
    LabelSelector { match_labels: (!labels.is_empty()).then_some(labels), match_expressions: None }
}

fn port((protocol, port): (Protocol, u16)) -> NetworkPolicyPort {
    NetworkPolicyPort {
        port: Some(IntOrString::Int(port.into())),
        protocol: Some(protocol.to_string()),
        end_port: None,
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn pod(name: &str, labels: &Value, owner: Option<&str>) -> Workload {
        let owners: Vec<Value> = owner
            .map(|owner| json!({"apiVersion": "apps/v1", "kind": "ReplicaSet", "name": owner, "uid": "u", "controller": true}))
            .into_iter()
            .collect();
        let pod = json!({"metadata": {"name": name, "namespace": "shop", "labels": labels, "ownerReferences": owners}});
        workload(&serde_json::from_value(pod).unwrap())
    }

    fn seen(way: PolicyWay, peer: Peer, protocol: Protocol, port: u16) -> Seen {
        Seen { way, peer, port, protocol }
    }

    fn labels(app: &str) -> BTreeMap<String, String> {
        BTreeMap::from([("app".to_owned(), app.to_owned())])
    }

    #[test]
    fn a_workload_is_named_by_what_lasts() {
        let web = pod("web-5d4-x", &json!({"app": "web", "pod-template-hash": "5d4"}), Some("web-5d4"));
        assert_eq!((web.name.as_str(), &web.labels), ("web", &labels("web")));
        let alone = pod("one", &json!({"app": "one"}), None);
        assert_eq!((alone.name.as_str(), alone.on_host), ("one", false));
    }

    #[test]
    fn a_policy_allows_what_was_seen() {
        let web = pod("web-5d4-x", &json!({"app": "web", "pod-template-hash": "5d4"}), Some("web-5d4"));
        let pods =
            |namespace: &str, app: &str| Peer::Pods { namespace: namespace.to_owned(), labels: labels(app) };
        let (inward, outward) = (PolicyWay::Ingress, PolicyWay::Egress);
        let flows = BTreeSet::from([
            seen(inward, pods("shop", "front"), Protocol::Tcp, 80),
            seen(inward, pods("other", "probe"), Protocol::Tcp, 80),
            seen(outward, Peer::Dns("10.43.0.10".parse().unwrap()), Protocol::Udp, 53),
            seen(outward, Peer::Address("192.0.2.7".parse().unwrap()), Protocol::Tcp, 443),
        ]);
        let policies = policies(&BTreeMap::from([(web, flows)]));
        let port = |protocol: &str, port: u16| json!({"port": port, "protocol": protocol});
        let namespace = |name: &str| json!({"matchLabels": {"kubernetes.io/metadata.name": name}});
        assert_eq!(
            serde_json::to_value(&policies).unwrap(),
            json!([{
                "apiVersion": "networking.k8s.io/v1", "kind": "NetworkPolicy",
                "metadata": {"name": "learned-web", "namespace": "shop"},
                "spec": {
                    "podSelector": {"matchLabels": {"app": "web"}},
                    "policyTypes": ["Ingress", "Egress"],
                    "ingress": [{"from": [
                        {"podSelector": {"matchLabels": {"app": "probe"}}, "namespaceSelector": namespace("other")},
                        {"podSelector": {"matchLabels": {"app": "front"}}},
                    ], "ports": [port("TCP", 80)]}],
                    "egress": [
                        {"to": [
                            {"podSelector": {"matchLabels": {"k8s-app": "kube-dns"}}, "namespaceSelector": namespace("kube-system")},
                            {"ipBlock": {"cidr": "10.43.0.10/32"}},
                        ], "ports": [port("TCP", 53), port("UDP", 53)]},
                        {"to": [{"ipBlock": {"cidr": "192.0.2.7/32"}}], "ports": [port("TCP", 443)]},
                    ],
                },
            }])
        );
    }

    #[test]
    fn many_addresses_are_anybody_and_names_stay_apart() {
        let flows: BTreeSet<Seen> = (1..=9)
            .map(|n| seen(PolicyWay::Ingress, Peer::Address(IpAddr::from([192, 0, 2, n])), Protocol::Tcp, 80))
            .collect();
        let (a, b) = (pod("x", &json!({"app": "a"}), None), pod("x", &json!({"app": "b"}), None));
        let policies = policies(&BTreeMap::from([(a, flows.clone()), (b, flows)]));
        let names: Vec<String> = policies.iter().map(ResourceExt::name_any).collect();
        assert_eq!(names, ["learned-x", "learned-x-2"]);
        let ingress = policies[0].spec.clone().unwrap().ingress.unwrap();
        let from: Vec<String> = ingress[0]
            .from
            .iter()
            .flatten()
            .filter_map(|peer| Some(peer.ip_block.as_ref()?.cidr.clone()))
            .collect();
        assert_eq!(from, ["0.0.0.0/0", "::/0"]);
    }
}
