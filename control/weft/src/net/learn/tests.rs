//! From pods and flows to the YAML that the user gets.

use k8s_openapi::api::core::v1::{Node, Pod};
use serde_json::{Value, json};
use weft_agent_dataplane::observe::tracked::TrackedFlow;
use weft_agent_dataplane::observe::wire::Protocol;
use weft_agent_dataplane::why::policy::PolicyWay;

use super::names::{Names, has_own_edge};
use super::plan;

const WEB: &str = "10.42.0.10";
const FRONT: &str = "10.42.0.11";
const BARE: &str = "10.42.0.12";
const GUEST: &str = "10.42.1.10";
const DNS: &str = "10.43.0.10";
const OUTSIDE: &str = "192.0.2.7";

fn pod(namespace: &str, name: &str, ip: &str, labels: &Value) -> Value {
    json!({
        "metadata": {"namespace": namespace, "name": name, "labels": labels},
        "spec": {"nodeName": "node-1", "containers": []},
        "status": {"phase": "Running", "podIPs": [{"ip": ip}]},
    })
}

fn read(pods: &[Value]) -> Vec<Pod> {
    pods.iter().map(|pod| serde_json::from_value(pod.clone()).unwrap()).collect()
}

/// A Deployment's pod and a lone one, one without labels, and one of another namespace.
fn shop() -> Vec<Value> {
    let mut web = pod("shop", "web-5d4-x", WEB, &json!({"app": "web", "pod-template-hash": "5d4"}));
    web["metadata"]["ownerReferences"] = json!([
        {"apiVersion": "apps/v1", "kind": "ReplicaSet", "name": "web-5d4", "uid": "u", "controller": true}
    ]);
    vec![
        web,
        pod("shop", "front", FRONT, &json!({"app": "front"})),
        pod("shop", "bare", BARE, &json!({"pod-template-hash": "1"})),
        pod("away", "guest", GUEST, &json!({"app": "guest"})),
    ]
}

fn names(pods: &[Value]) -> Names {
    let inside = ["10.42.0.0/16", "10.43.0.0/16"].map(|range| range.parse().unwrap());
    let mut names = Names::new("shop", vec![DNS.parse().unwrap()], inside.into());
    let node: Node = serde_json::from_value(json!({
        "metadata": {"name": "node-2"}, "spec": {"podCIDRs": ["10.42.1.0/24"]},
        "status": {"addresses": [{"type": "InternalIP", "address": "10.44.0.3"}, {"type": "Hostname", "address": "node-2"}]},
    }))
    .unwrap();
    names.learn(&read(pods), &[node]);
    names
}

fn flow(way: PolicyWay, pod: &str, peer: &str, protocol: Protocol, port: u16) -> TrackedFlow {
    let peer_is_node = peer == "10.42.0.1" || peer == DNS;
    TrackedFlow { way, pod: pod.parse().unwrap(), peer: peer.parse().unwrap(), peer_is_node, port, protocol }
}

fn into(pod: &str, peer: &str, port: u16) -> TrackedFlow {
    flow(PolicyWay::Ingress, pod, peer, Protocol::Tcp, port)
}

fn out(pod: &str, peer: &str, port: u16) -> TrackedFlow {
    flow(PolicyWay::Egress, pod, peer, Protocol::Tcp, port)
}

fn proposed(names: &mut Names, flows: Vec<TrackedFlow>) -> String {
    names.name(flows);
    names.finish();
    plan::render(&plan::policies(names.seen())).unwrap()
}

#[test]
fn each_workload_is_allowed_what_was_seen_of_it() {
    let mut names = names(&shop());
    let flows = vec![
        into(WEB, FRONT, 80),
        into(WEB, GUEST, 80),
        into(WEB, "10.44.0.3", 80),
        // Probes of the own node, and another's host by its end of the tunnel.
        into(WEB, "10.42.0.1", 80),
        into(WEB, "10.42.1.1", 8_080),
        flow(PolicyWay::Egress, WEB, DNS, Protocol::Udp, 53),
        out(WEB, OUTSIDE, 443),
        out(FRONT, WEB, 80),
        // Of another namespace's pods nothing is proposed.
        out(GUEST, WEB, 80),
    ];
    assert_eq!(proposed(&mut names, flows), include_str!("tests/workloads.yaml"));
    assert_eq!((names.flows(), names.notes()), (7, Vec::<String>::new()));
}

#[test]
fn nothing_seen_is_nothing_proposed() {
    assert_eq!(proposed(&mut names(&shop()), Vec::new()), "");
}

#[test]
fn what_no_selector_can_say_is_said() {
    let mut names = names(&shop());
    let proposed = proposed(&mut names, vec![out(BARE, WEB, 80), into(WEB, BARE, 80)]);
    assert_eq!(proposed, include_str!("tests/bare.yaml"));
    assert_eq!(
        names.notes(),
        [
            "pod shop/bare has no labels of its own: no policy can select it alone, and none is proposed for it",
            "pod shop/bare has no labels of its own: who talks to it is allowed its whole namespace",
        ]
    );
}

#[test]
fn a_pod_that_is_not_known_yet_is_waited_for_and_one_that_never_is_is_left_out() {
    let mut names = names(&shop());
    names.name(vec![into(WEB, "10.42.0.20", 80), into(WEB, "10.42.0.21", 80)]);
    let mut late = pod("shop", "late", "10.42.0.20", &json!({"app": "late"}));
    late["status"]["phase"] = "Succeeded".into();
    names.learn(&read(&[late]), &[]);
    let proposed = proposed(&mut names, Vec::new());
    assert!(proposed.contains("app: late") && !proposed.contains("10.42.0.21"), "{proposed}");
    assert_eq!(names.notes(), ["flows with 1 address(es) that no pod has are left out: 10.42.0.21"]);
}

#[test]
fn an_address_is_whose_it_is_when_it_is_seen() {
    let mut names = names(&shop());
    names.name(vec![into(WEB, FRONT, 80)]);
    names.learn(&read(&[pod("shop", "heir", FRONT, &json!({"app": "heir"}))]), &[]);
    let proposed = proposed(&mut names, vec![into(WEB, FRONT, 81)]);
    let (front, heir) = (proposed.find("app: front").unwrap(), proposed.find("app: heir").unwrap());
    let (first, second) = (proposed.find("port: 80\n").unwrap(), proposed.find("port: 81\n").unwrap());
    assert!(front < first && first < heir && heir < second, "{proposed}");
}

#[test]
fn many_addresses_outside_are_anybody_of_their_family() {
    let mut names = names(&shop());
    let crowd = (1..=20).map(|n| into(WEB, &format!("192.0.2.{n}"), 80));
    let flows = crowd.chain([into(WEB, "2001:db8::1", 80), into(WEB, "192.0.2.1", 443)]).collect();
    assert_eq!(proposed(&mut names, flows), include_str!("tests/anybody.yaml"));
}

#[test]
fn names_of_policies_are_valid_and_apart() {
    let long = "x".repeat(253);
    let of = |name: &str, app: &str, ip: &str| pod("shop", name, ip, &json!({"app": app}));
    let pods = [
        of("x", "a", "10.42.0.31"),
        of("x", "b", "10.42.0.32"),
        of("x-2", "c", "10.42.0.33"),
        of(&long, "d", "10.42.0.34"),
    ];
    let mut names = names(&pods);
    names.name((31..=34).map(|n| into(&format!("10.42.0.{n}"), OUTSIDE, 80)).collect());
    let policies = plan::policies(names.seen());
    let names: Vec<&str> = policies.iter().filter_map(|policy| policy.metadata.name.as_deref()).collect();
    assert_eq!(names[..3], ["learned-x", "learned-x-2", "learned-x-2-2"]);
    assert_eq!(names[3].len(), 253);
}

#[test]
fn pods_with_an_edge_run_and_have_addresses_of_their_own() {
    let alive = pod("shop", "front", FRONT, &json!({}));
    let with = |path: &str, value: Value| {
        let mut pod = alive.clone();
        *pod.pointer_mut(path).unwrap() = value;
        read(&[pod]).remove(0)
    };
    assert!(has_own_edge(&read(std::slice::from_ref(&alive))[0]));
    assert!(!has_own_edge(&with("/status/phase", "Pending".into())));
    assert!(!has_own_edge(&with("/status/podIPs", json!([]))));
    assert!(!has_own_edge(&with("/spec", json!({"hostNetwork": true, "containers": []}))));
}
