//! `weft policy learn`: NetworkPolicies that allow what is seen.
//!
//! ```text
//! policy on trial → pods' edges remember flows → read now and then → named by the pods' labels → policies
//! ```
//!
//! The policy on trial selects every pod of the namespace and drops nothing. It is there for the time of the watch; without it nothing is
//! remembered, and nothing costs anything.

mod names;
mod plan;
mod trial;

use std::collections::{BTreeMap, BTreeSet};
use std::io::Write as _;
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail, ensure};
use k8s_openapi::api::core::v1::{Namespace, Pod};
use kube::{Api, ResourceExt as _};
use weft_agent_dataplane::observe::tracked::Tracked;
use weft_agent_dataplane::observe::wire::Request;

use super::Said;
use super::args::LearnArgs;
use super::reach::Reach;
use names::Names;
use trial::Trial;

/// How often flows are taken: a node remembers a bounded number.
const LOOK: Duration = Duration::from_secs(5);
/// How far each look goes back beyond the one before: the edges' clock counts whole seconds.
const OVERLAP_SECONDS: u32 = 2;
/// How long the nodes may take to have every pod watched.
const PATIENCE: Duration = Duration::from_secs(15);
const PAUSE: Duration = Duration::from_millis(100);

/// `weft policy learn`: watches, then writes the policies.
pub(crate) async fn learn(reach: &Reach, args: &LearnArgs) -> anyhow::Result<Said> {
    let stop = crate::up::shutdown_on_signal()?;
    let pods = watchable(reach, &args.namespace).await?;
    let trial = Trial::new(&reach.client, &args.namespace);
    let work = async {
        trial.put().await?;
        watch(reach, args, &trial, pods).await
    };
    let watched = stop.run_until_cancelled(Box::pin(work)).await;
    let removed = trial.remove().await;
    let names = match (watched.unwrap_or_else(|| Err(anyhow::anyhow!("interrupted"))), &removed) {
        (Ok(names), _) => names,
        (Err(error), Ok(())) => return Err(error),
        (Err(error), Err(stays)) => bail!("{error:#}; and {stays:#}"),
    };
    if let Err(stays) = &removed {
        say(format_args!("error: {stays:#}"));
    }
    for note in names.notes() {
        say(format_args!("{note}"));
    }
    let policies = plan::policies(names.seen());
    say(format_args!("{} flow(s) seen, {} policies proposed", names.flows(), policies.len()));
    Ok(Said { text: plan::render(&policies)?, yes: removed.is_ok() })
}

/// Uids of the pods that can be watched, by node. Nothing has been made yet when this fails.
async fn watchable(reach: &Reach, namespace: &str) -> anyhow::Result<BTreeMap<String, BTreeSet<String>>> {
    let api: Api<Namespace> = Api::all(reach.client.clone());
    let found = api.get_opt(namespace).await;
    let found = found.with_context(|| format!("cannot get the Namespace {namespace}"))?;
    ensure!(found.is_some(), "there is no namespace {namespace}");
    let mut here: BTreeMap<String, BTreeSet<String>> = BTreeMap::new();
    for pod in reach.pods(Some(namespace), "").await?.iter().filter(|pod| names::has_own_edge(pod)) {
        let node = pod.spec.as_ref().and_then(|spec| spec.node_name.clone()).unwrap_or_default();
        if reach.nodes.iter().any(|known| known.name == node) {
            here.entry(node).or_default().extend(pod.uid());
        } else {
            say(format_args!("pod {} is not watched: node {node} is not on this machine", pod.name_any()));
        }
    }
    ensure!(!here.is_empty(), "no pod of namespace {namespace} runs here with an address of its own");
    Ok(here)
}

async fn watch(
    reach: &Reach,
    args: &LearnArgs,
    trial: &Trial,
    pods: BTreeMap<String, BTreeSet<String>>,
) -> anyhow::Result<Names> {
    let count: usize = pods.values().map(BTreeSet::len).sum();
    let begun = Instant::now();
    until_on_trial(reach, pods).await?;
    say(format_args!("watching {count} pod(s) of {} for {} s", args.namespace, args.duration.as_secs()));
    let cluster = &reach.cluster;
    let inside = cluster.cluster_cidr.iter().chain(cluster.service_cidr.iter()).collect();
    let mut names = Names::new(&args.namespace, cluster.dns_ips().iter().collect(), inside);
    // Pods that end are known from before they do.
    names.learn(&everybody(reach).await?, &reach.api_nodes().await?);
    let (mut full, mut last, watching) = (BTreeSet::new(), begun, Instant::now());
    loop {
        tokio::time::sleep(args.duration.saturating_sub(watching.elapsed()).min(LOOK)).await;
        trial.check().await?;
        let within = u32::try_from(last.elapsed().as_secs()).unwrap_or(u32::MAX);
        let within_seconds = within.saturating_add(OVERLAP_SECONDS);
        last = Instant::now();
        let mut flows = Vec::new();
        for node in &reach.nodes {
            let tracked: Tracked = node.ask(&Request::Tracked { within_seconds })?;
            if tracked.full && full.insert(&node.name) {
                say(format_args!(
                    "node {} sees more flows than it can remember; some may be missing",
                    node.name
                ));
            }
            flows.extend(tracked.flows);
        }
        // Only after the flows: who has sent something was there before it.
        names.learn(&everybody(reach).await?, &reach.api_nodes().await?);
        names.name(flows);
        if watching.elapsed() >= args.duration {
            names.finish();
            return Ok(names);
        }
    }
}

async fn everybody(reach: &Reach) -> anyhow::Result<Vec<Pod>> {
    reach.pods(None, "").await
}

/// Waits until the nodes watch the pods.
async fn until_on_trial(reach: &Reach, mut pods: BTreeMap<String, BTreeSet<String>>) -> anyhow::Result<()> {
    let deadline = Instant::now() + PATIENCE;
    loop {
        for (name, uids) in &mut pods {
            let request = Request::NotOnTrial { pods: std::mem::take(uids) };
            *uids = reach.node(name)?.ask(&request)?;
        }
        pods.retain(|_, uids| !uids.is_empty());
        if pods.is_empty() {
            return Ok(());
        }
        if Instant::now() > deadline {
            let nodes: Vec<&str> = pods.keys().map(String::as_str).collect();
            bail!("after {} s not all pods are watched on {}", PATIENCE.as_secs(), nodes.join(", "));
        }
        tokio::time::sleep(PAUSE).await;
    }
}

/// Tells whoever runs it. Nobody may listen any more, and the policy has to go all the same.
fn say(text: std::fmt::Arguments<'_>) {
    let _ = writeln!(std::io::stderr().lock(), "{text}");
}

#[cfg(test)]
mod tests;
