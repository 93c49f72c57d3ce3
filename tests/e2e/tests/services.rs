//! Services as objects of a whole cluster: what they are given stays theirs, whatever is killed.

use std::collections::{BTreeMap, BTreeSet};
use std::io::Write as _;
use std::process::Stdio;

use anyhow::Context as _;
use serde_json::{Value, json};
use weft_tests_e2e::{cluster, eventually};
use weft_tests_harness::cluster::Cluster;

const ROUNDS: usize = 4;
const BATCH: usize = 40;

fn list(cluster: &Cluster, what: &str) -> anyhow::Result<Vec<Value>> {
    let answer: Value = serde_json::from_str(&cluster.kubectl(&["get", what, "-A", "-o", "json"])?)?;
    Ok(answer["items"].as_array().cloned().unwrap_or_default())
}

fn texts(list: &Value) -> impl Iterator<Item = String> {
    list.as_array().into_iter().flatten().filter_map(|one| one.as_str().map(str::to_owned))
}

/// Every cluster IP is one Service's, and the IPAddress of that name says which; no node port is two Services'.
fn consistent(cluster: &Cluster) -> anyhow::Result<usize> {
    let mut used = BTreeMap::new();
    let mut ports = BTreeSet::new();
    for service in list(cluster, "services")? {
        let owner = json!([service["metadata"]["namespace"], service["metadata"]["name"]]);
        for address in texts(&service["spec"]["clusterIPs"]).filter(|one| one != "None") {
            let other = used.insert(address.clone(), owner.clone());
            anyhow::ensure!(other.is_none(), "{address} is of {owner} and of {other:?}");
        }
        for port in service["spec"]["ports"].as_array().into_iter().flatten() {
            let Some(port) = port["nodePort"].as_u64() else { continue };
            anyhow::ensure!(ports.insert(port), "{port} is of {owner} and of another");
        }
    }
    let known: BTreeMap<String, Value> = list(cluster, "ipaddresses")?
        .into_iter()
        .map(|address| {
            let parent = &address["spec"]["parentRef"];
            let name = address["metadata"]["name"].as_str().unwrap_or_default().to_owned();
            (name, json!([parent["namespace"], parent["name"]]))
        })
        .collect();
    anyhow::ensure!(used == known, "Services have {used:#?}, IPAddresses say {known:#?}");
    Ok(used.len())
}

fn batch(round: usize) -> Value {
    let items: Vec<Value> = (0..BATCH)
        .map(|number| {
            json!({"apiVersion": "v1", "kind": "Service", "metadata": {"name": format!("r{round}-{number}")},
                "spec": {"type": "NodePort", "ports": [{"port": 80}]}})
        })
        .collect();
    json!({"apiVersion": "v1", "kind": "List", "items": items})
}

#[test]
fn what_is_allocated_survives_kills() -> anyhow::Result<()> {
    let test = "services::what_is_allocated_survives_kills";
    let Some(mut cluster) = cluster(test, "alloc", &[])? else { return Ok(()) };
    for round in 0..ROUNDS {
        let mut writer = cluster
            .kubectl_command(&["create", "-f", "-"])?
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()?;
        writer.stdin.take().context("kubectl reads")?.write_all(batch(round).to_string().as_bytes())?;
        // Somewhere amid the batch, each time later.
        let mut said = std::io::BufReader::new(writer.stdout.take().context("kubectl speaks")?);
        for _line in 0..=round * 5 {
            std::io::BufRead::read_line(&mut said, &mut String::new())?;
        }
        let process = cluster.process().context("weft runs")?;
        process.kill()?;
        process.wait()?;
        writer.kill()?;
        writer.wait()?;
        cluster.up().with_context(|| format!("start after kill {round}"))?;
        let count = consistent(&cluster).with_context(|| format!("after kill {round}"))?;
        eprintln!("kill {round}: {count} addresses, each of one Service");
    }
    // What is left serves on.
    cluster.kubectl(&["delete", "services", "--all"])?;
    cluster.kubectl(&["create", "service", "nodeport", "after", "--tcp=80"])?;
    consistent(&cluster)?;
    cluster.purge()
}

#[test]
fn balancers_get_addresses_of_the_flags_pool() -> anyhow::Result<()> {
    let test = "services::balancers_get_addresses_of_the_flags_pool";
    let flags = ["--load-balancer-pool", "203.0.113.0/30"];
    let Some(mut cluster) = cluster(test, "pool", &flags)? else { return Ok(()) };
    let address =
        |name: &'static str| ["get", "service", name, "-o", "jsonpath={.status.loadBalancer.ingress[*].ip}"];
    for (name, expected) in [("one", "203.0.113.1"), ("two", "203.0.113.2")] {
        cluster.kubectl(&["create", "service", "loadbalancer", name, "--tcp=80"])?;
        eventually(&cluster, &address(name), |said| said == expected)?;
    }
    cluster.kubectl(&["create", "service", "loadbalancer", "three", "--tcp=80"])?;
    let events = ["get", "events", "--field-selector", "reason=SyncLoadBalancerFailed", "-o", "name"];
    eventually(&cluster, &events, |said| !said.is_empty())?;
    let process = cluster.process().context("weft runs")?;
    process.kill()?;
    process.wait()?;
    cluster.up()?;
    cluster.kubectl(&["delete", "service", "one"])?;
    eventually(&cluster, &address("three"), |said| said == "203.0.113.1")?;
    assert_eq!(cluster.kubectl(&address("two"))?, "203.0.113.2", "kept over the restart");
    cluster.purge()
}
