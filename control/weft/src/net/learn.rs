//! `weft policy learn`: NetworkPolicies that allow what is seen.
//!
//! For the time of the watch a policy on trial selects every pod of the namespace: it drops nothing, and has the pods' edges remember each
//! flow. These are read now and then, as an edge remembers a bounded number, and named by the pods that have their addresses.

mod plan;

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::net::IpAddr;
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail};
use k8s_openapi::api::core::v1::Pod;
use k8s_openapi::api::networking::v1::NetworkPolicy;
use kube::api::{DeleteParams, Patch, PatchParams};
use kube::{Api, ResourceExt as _};
use serde_json::json;
use weft_agent_dataplane::observe::tracked::{Tracked, TrackedFlow};
use weft_agent_dataplane::observe::wire::Request;
use weft_agent_dataplane::why::policy::PolicyWay;

use super::Said;
use super::args::LearnArgs;
use super::reach::Reach;
use plan::{Peer, Seen, Workload};

/// The policy on trial.
const TRIAL: &str = "weft-policy-learn";
/// How often flows are taken, and how far back each look goes: the clock of the edges counts whole seconds.
const LOOK: Duration = Duration::from_secs(5);
const OVERLAP_SECONDS: u32 = 2;
/// How long the nodes may take to have every pod watched.
const PATIENCE: Duration = Duration::from_secs(15);
const PAUSE: Duration = Duration::from_millis(100);

/// Pods by their addresses, those that were there at some time of the watch.
#[derive(Default)]
struct Pods {
    by_address: HashMap<IpAddr, Workload>,
    /// Names of pods without labels, which no selector can tell from others.
    nameless: BTreeSet<String>,
    /// Addresses of nodes.
    nodes: HashMap<IpAddr, String>,
}

/// `weft policy learn`: watches, then writes the policies.
pub(crate) async fn learn(reach: &Reach, args: &LearnArgs) -> anyhow::Result<Said> {
    let api: Api<NetworkPolicy> = Api::namespaced(reach.client.clone(), &args.namespace);
    put_trial(&api).await?;
    let watched = tokio::select! {
        watched = watch(reach, args) => watched,
        // What was seen until then is lost, but not the policy left.
        _ = tokio::signal::ctrl_c() => Err(anyhow::anyhow!("interrupted")),
    };
    let gone = api.delete(TRIAL, &DeleteParams::default()).await;
    let (flows, pods) = watched?;
    gone.with_context(|| format!("cannot delete the NetworkPolicy {TRIAL}"))?;
    for name in &pods.nameless {
        eprintln!("pod {name} has no labels, so no policy can select it alone; none is proposed for it");
    }
    let dns: Vec<IpAddr> = reach.cluster.dns_ips().iter().collect();
    let seen = named(&flows, &pods, &args.namespace, &dns);
    let policies = plan::policies(&seen);
    eprintln!("{} flow(s) seen, {} policies proposed", flows.len(), policies.len());
    let mut text = String::new();
    for policy in &policies {
        text.push_str("---\n");
        text.push_str(&serde_saphyr::to_string(policy).context("cannot write a policy")?);
    }
    Ok(Said { text, yes: true })
}

async fn put_trial(api: &Api<NetworkPolicy>) -> anyhow::Result<()> {
    let trial = json!({
        "apiVersion": "networking.k8s.io/v1", "kind": "NetworkPolicy",
        "metadata": {"name": TRIAL, "annotations": {"weft.dev/dry-run": "true"}},
        "spec": {"podSelector": {}, "policyTypes": ["Ingress", "Egress"]},
    });
    let params = PatchParams::apply("weft").force();
    let put = api.patch(TRIAL, &params, &Patch::Apply(&trial)).await;
    put.map(drop).with_context(|| format!("cannot put the NetworkPolicy {TRIAL}"))
}

async fn watch(reach: &Reach, args: &LearnArgs) -> anyhow::Result<(BTreeSet<TrackedFlow>, Pods)> {
    let begun = Instant::now();
    let mut pods = Pods::default();
    pods.learn(reach, &args.namespace).await?;
    let wanted = pods.by_address.values().filter(|pod| pod.namespace == args.namespace && !pod.on_host);
    let wanted: BTreeSet<&str> = wanted.map(|pod| pod.pod.as_str()).collect();
    let wanted = wanted.len();
    if wanted == 0 {
        bail!("namespace {} has no pod with an address of its own", args.namespace);
    }
    while on_trial(reach)? < wanted {
        if begun.elapsed() > PATIENCE {
            bail!("after {} s the nodes do not watch all {wanted} pods", PATIENCE.as_secs());
        }
        tokio::time::sleep(PAUSE).await;
    }
    eprintln!("watching {wanted} pod(s) of {} for {} s", args.namespace, args.duration.as_secs());
    let (begun, mut flows) = (Instant::now(), BTreeSet::new());
    loop {
        let left = args.duration.saturating_sub(begun.elapsed());
        let since = Instant::now();
        tokio::time::sleep(left.min(LOOK)).await;
        let within = u32::try_from(since.elapsed().as_secs()).unwrap_or(u32::MAX);
        for tracked in tracked(reach, within.saturating_add(OVERLAP_SECONDS))? {
            flows.extend(tracked.flows);
        }
        pods.learn(reach, &args.namespace).await?;
        if begun.elapsed() >= args.duration {
            return Ok((flows, pods));
        }
    }
}

fn tracked(reach: &Reach, within_seconds: u32) -> anyhow::Result<Vec<Tracked>> {
    reach.nodes.iter().map(|node| node.ask(&Request::Tracked { within_seconds })).collect()
}

fn on_trial(reach: &Reach) -> anyhow::Result<usize> {
    Ok(tracked(reach, 0)?.iter().map(|tracked| tracked.on_trial).sum())
}

impl Pods {
    async fn learn(&mut self, reach: &Reach, namespace: &str) -> anyhow::Result<()> {
        for pod in reach.pods(None, "").await? {
            let phase = pod.status.as_ref().and_then(|status| status.phase.as_deref());
            // What has ended keeps its address in the API, and may have given it to another.
            if phase != Some("Running") {
                continue;
            }
            let workload = plan::workload(&pod);
            if workload.labels.is_empty() && workload.namespace == namespace && !workload.on_host {
                self.nameless.insert(pod.name_any());
            }
            for address in addresses(&pod) {
                if !workload.on_host {
                    self.by_address.insert(address, workload.clone());
                }
            }
        }
        for node in reach.api_nodes().await? {
            let listed = node.status.iter().flat_map(|status| status.addresses.iter().flatten());
            let addresses = listed.filter_map(|address| address.address.parse().ok());
            self.nodes.extend(addresses.map(|address| (address, node.name_any())));
        }
        Ok(())
    }
}

fn addresses(pod: &Pod) -> Vec<IpAddr> {
    let ips = pod.status.iter().flat_map(|status| status.pod_ips.iter().flatten());
    ips.filter_map(|ip| ip.ip.parse().ok()).collect()
}

/// The flows of the namespace's pods, with names in place of addresses.
fn named(
    flows: &BTreeSet<TrackedFlow>,
    pods: &Pods,
    namespace: &str,
    dns: &[IpAddr],
) -> BTreeMap<Workload, BTreeSet<Seen>> {
    let mut all: BTreeMap<Workload, BTreeSet<Seen>> = BTreeMap::new();
    for flow in flows {
        let Some(subject) = pods.by_address.get(&flow.pod) else { continue };
        if subject.namespace != namespace || subject.labels.is_empty() {
            continue;
        }
        // A node always reaches its own pods, as for probes, and its pods it.
        let own_node = pods.nodes.get(&flow.peer).is_some_and(|node| *node == subject.node);
        if own_node && flow.way == PolicyWay::Ingress {
            continue;
        }
        let peer = match pods.by_address.get(&flow.peer) {
            _ if dns.contains(&flow.peer) => Peer::Dns(flow.peer),
            Some(peer) => Peer::Pods { namespace: peer.namespace.clone(), labels: peer.labels.clone() },
            None => Peer::Address(flow.peer),
        };
        let seen = Seen { way: flow.way, peer, port: flow.port, protocol: flow.protocol };
        // Pods of one workload are one.
        let subject = Workload { pod: String::new(), node: String::new(), ..subject.clone() };
        all.entry(subject).or_default().insert(seen);
    }
    all
}
