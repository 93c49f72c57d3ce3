//! What an agent makes of a network that has all faults: a link that drops large packets without a word, behind a card that breaks
//! checksums.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use weft_agent_dataplane::{Config, cleanup, node, run};
use weft_cni_netlink::Netlink;
use weft_tests_harness::require;

use crate::NEEDS;
use crate::agent::{Api, config_of, get};
use crate::card::Card;
use crate::offload::{finishes, get_through, nodes, pod};
use crate::place::{remove, serve, within};

/// A bound against waiting for ever: a search takes ten seconds.
const PATIENCE: Duration = Duration::from_secs(60);
const NARROW: u32 = 1_400;

fn node_object(number: u8) -> Value {
    let ranges = [format!("10.42.{number}.0/24"), format!("fd42:0:0:{number}::/64")];
    json!({"apiVersion": "v1", "kind": "Node",
        "metadata": {"name": format!("node-{number}"), "uid": format!("u-{number}"), "resourceVersion": "3"},
        "spec": {"podCIDR": ranges[0], "podCIDRs": ranges},
        "status": {"addresses": [{"type": "InternalIP", "address": format!("192.168.79.{number}")}]}})
}

/// What the agent's programs are kept by, removed also if the test fails.
struct Kept {
    pins: PathBuf,
    cgroup: PathBuf,
    _folder: tempfile::TempDir,
}

impl Drop for Kept {
    fn drop(&mut self) {
        remove(&self.pins, &self.cgroup);
    }
}

#[test]
fn an_agent_finds_what_is_wrong_with_the_network_and_says_so() {
    if !require("dataplane::findings", &NEEDS) {
        return;
    }
    let (cards, netns, pods, [first, _second]) = nodes(Card::Broken);
    // The agent makes its own.
    drop(first);
    cards.narrow(NARROW);
    let folder = tempfile::tempdir().unwrap();
    let pins = folder.path().join("bpf");
    let cgroup = node::cgroup2_mount().unwrap().join("weft").join(netns[0].name());
    let kept = Kept { pins, cgroup, _folder: folder };
    let api = Api::default();
    api.list("nodes", vec![node_object(1), node_object(2)]);
    let config = Config {
        node_name: "node-1".to_owned(),
        node_ip: [192, 168, 79, 1].into(),
        cluster_cidr: ["10.42.0.0/16", "fd42::/56"].map(|range| range.parse().unwrap()).into(),
        service_cidr: ["10.43.0.0/16", "fd43::/112"].map(|range| range.parse().unwrap()).into(),
        ..config_of(netns[0].name(), &kept.pins)
    };
    let servers = pod(2).map(|ip| serve(&pods[1], ip, "far"));
    assert_eq!(get_through(&pods[0], servers), [false; 4]);
    within(&netns[0], || {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(life(&api, &config));
        runtime.block_on(next_life(&api, &config));
        // What it has found out holds without it.
        assert!(!finishes(&netns[0]));
        assert_eq!(get_through(&pods[0], servers), [true; 4]);
        runtime.block_on(cleanup(&config)).unwrap();
    });
}

/// The reasons of Events, by which each is told once.
fn events(api: &Api) -> Vec<String> {
    let reason = |event: &Value| event["reason"].as_str().unwrap_or_default().to_owned();
    let mut reasons: Vec<String> = api.created().iter().map(reason).collect();
    reasons.sort();
    reasons
}

/// The next agent finds all as it should be, and says nothing of it again.
async fn next_life(api: &Api, config: &Config) {
    let told = api.created().len();
    let shutdown = CancellationToken::new();
    let (programmed, mut is_programmed) = watch::channel(false);
    let running = tokio::spawn(run(config.clone(), api.client(), programmed, shutdown.clone()));
    tokio::time::timeout(PATIENCE, is_programmed.wait_for(|is| *is)).await.unwrap().unwrap();
    let wanted = ["weft_dataplane_narrow_paths 1\n", "weft_dataplane_checksum_offload_off 1\n"];
    let deadline = Instant::now() + PATIENCE;
    loop {
        let metrics = get(10_249, "/metrics").await;
        if wanted.iter().all(|line| metrics.contains(line)) {
            break;
        }
        assert!(Instant::now() < deadline, "{metrics}");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    assert_eq!(routes_take(), [Some(NARROW - 50); 2]);
    assert_eq!(api.created().len(), told);
    shutdown.cancel();
    tokio::time::timeout(PATIENCE, running).await.unwrap().unwrap().unwrap();
}

/// What fits on the routes to the other node's pods.
fn routes_take() -> [Option<u32>; 2] {
    pod(2).map(|ip| Netlink::open().unwrap().route_to(ip).unwrap().unwrap().mtu_bytes)
}

async fn life(api: &Api, config: &Config) {
    let shutdown = CancellationToken::new();
    let (programmed, _is_programmed) = watch::channel(false);
    let running = tokio::spawn(run(config.clone(), api.client(), programmed, shutdown.clone()));
    let deadline = Instant::now() + PATIENCE;
    while api.created().len() < 2 {
        assert!(Instant::now() < deadline && !running.is_finished(), "{:?}", api.created());
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    assert_eq!(events(api), ["ChecksumOffloadBroken", "NarrowPath"]);
    for event in api.created() {
        let regarding =
            (&event["regarding"]["kind"], &event["regarding"]["name"], &event["regarding"]["uid"]);
        assert_eq!(regarding, (&json!("Node"), &json!("node-1"), &json!("u-1")), "{event}");
        let note = event["note"].as_str().unwrap();
        assert!(note.contains("node-2"), "{note}");
        assert_eq!(note.contains("1400 bytes"), event["reason"] == "NarrowPath", "{note}");
    }
    let metrics = get(10_249, "/metrics").await;
    for line in ["weft_dataplane_narrow_paths 1\n", "weft_dataplane_checksum_offload_off 1\n"] {
        assert!(metrics.contains(line), "{line} is missing in\n{metrics}");
    }
    assert_eq!(routes_take(), [Some(NARROW - 50); 2]);
    shutdown.cancel();
    tokio::time::timeout(PATIENCE, running).await.unwrap().unwrap().unwrap();
}
