//! The parts of the cluster that belong to no node: certificates, leases, Nodes, Services.

use std::path::Path;

use k8s_openapi::api::coordination::v1::Lease;
use k8s_openapi::api::core::v1::Node;
use k8s_openapi::jiff::Timestamp;
use kube::ResourceExt as _;
use kube::api::{Api, ListParams};

use super::Finding;
use crate::net::reach::Reach;
use crate::net::service;

/// A certificate that ends sooner is to be looked at.
const SOON_DAYS: i64 = 30;
const DAY_SECONDS: i64 = 86_400;
/// A node's lease is renewed every 10 s; one that is older than the control plane's grace is as good as gone.
const LEASE_SECONDS: i64 = 40;
/// Clocks that are further apart make leases and certificates lie.
const SKEW_SECONDS: i64 = 5;
/// Leases of the control plane's parts.
const PARTS: [&str; 2] = ["kube-scheduler", "kube-controller-manager"];

/// Every certificate below the data directory.
pub(super) fn certificates(reach: &Reach) -> Vec<Finding> {
    let mut folders = vec![reach.paths.pki()];
    folders.extend(reach.nodes.iter().map(|node| reach.paths.node(&node.name).pki()));
    let (mut findings, mut good) = (Vec::new(), 0);
    let now = Timestamp::now().as_second();
    for folder in folders {
        let Ok(entries) = std::fs::read_dir(&folder) else { continue };
        for path in entries.flatten().map(|entry| entry.path()) {
            if path.extension().is_none_or(|extension| extension != "crt") {
                continue;
            }
            match std::fs::read(&path).ok().as_deref().and_then(ends_at) {
                Some(end) => match expiry(&path, end, now) {
                    Some(finding) => findings.push(finding),
                    None => good += 1,
                },
                None => findings.push(Finding::fail(
                    "certificate",
                    format!("{} can't be read", path.display()),
                    "remove it and start the cluster again: it is made anew",
                )),
            }
        }
    }
    if good > 0 {
        findings.push(Finding::ok("certificate", format!("{good} are good for {SOON_DAYS} days and more")));
    }
    findings
}

/// When the first certificate of a PEM file ends, in seconds of the epoch.
fn ends_at(pem: &[u8]) -> Option<i64> {
    let (_, pem) = x509_parser::pem::parse_x509_pem(pem).ok()?;
    Some(pem.parse_x509().ok()?.validity().not_after.timestamp())
}

fn expiry(path: &Path, end: i64, now: i64) -> Option<Finding> {
    let name = path.display();
    let advice = "remove it with its key and start the cluster again: it is made anew";
    match (end - now) / DAY_SECONDS {
        _ if end <= now => Some(Finding::fail("certificate", format!("{name} has expired"), advice)),
        days if days < SOON_DAYS => {
            Some(Finding::warn("certificate", format!("{name} expires in {days} days"), advice))
        }
        _ => None,
    }
}

/// The Nodes' own word.
pub(super) fn nodes(nodes: &[Node]) -> Vec<Finding> {
    let mut findings = Vec::new();
    for node in nodes {
        let conditions = node.status.iter().flat_map(|status| status.conditions.iter().flatten());
        let ready = conditions.into_iter().find(|condition| condition.type_ == "Ready");
        let finding = match ready {
            Some(ready) if ready.status == "True" => Finding::ok("node", "it is Ready"),
            Some(ready) => Finding::fail(
                "node",
                format!("it is not Ready: {}", ready.message.as_deref().unwrap_or("no reason given")),
                "look into its agent's log",
            ),
            None => Finding::fail("node", "its kubelet has not reported", "start its agent with `weft up`"),
        };
        findings.push(finding.on(&node.name_any()));
    }
    findings
}

/// Leases of the nodes and of the control plane's parts: who lives, and whether the clocks agree.
pub(super) async fn leases(reach: &Reach) -> Vec<Finding> {
    let api: Api<Lease> = Api::all(reach.client.clone());
    let leases = match api.list(&ListParams::default()).await {
        Ok(leases) => leases.items,
        Err(error) => {
            return vec![Finding::fail(
                "lease",
                format!("the leases can't be listed: {error}"),
                "look into weft.log",
            )];
        }
    };
    let now = Timestamp::now().as_second();
    let mut findings = Vec::new();
    for lease in &leases {
        let (namespace, name) = (lease.namespace().unwrap_or_default(), lease.name_any());
        let node = namespace == "kube-node-lease";
        if !node && !PARTS.contains(&name.as_str()) {
            continue;
        }
        let renewed =
            lease.spec.as_ref().and_then(|spec| spec.renew_time.as_ref()).map(|at| at.0.as_second());
        let finding = lease_finding(&name, renewed, now);
        findings.push(if node { finding.on(&name) } else { finding });
    }
    findings
}

fn lease_finding(name: &str, renewed: Option<i64>, now: i64) -> Finding {
    match renewed.map(|at| now - at) {
        None => Finding::fail("lease", format!("{name} never renewed its lease"), "look into its log"),
        Some(age) if age < -SKEW_SECONDS => Finding::warn(
            "clock",
            format!("{name} renewed its lease {} s in the future", -age),
            "let all machines take their time from one source",
        ),
        Some(age) if age > LEASE_SECONDS => Finding::fail(
            "lease",
            format!("{name} renewed its lease {age} s ago"),
            "see whether it runs and reaches the API",
        ),
        Some(_) => Finding::ok("lease", format!("{name} renews its lease")),
    }
}

/// Whether every node has every Service.
pub(super) async fn services(reach: &Reach) -> Finding {
    match service::listing(reach).await {
        Ok((count, behind)) if behind.is_empty() => {
            Finding::ok("services", format!("all {count} Services are on every node"))
        }
        Ok((_, behind)) => Finding::fail(
            "services",
            format!("{} lag behind: {}", behind.len(), behind.join(", ")),
            "`weft service show` says what a node lacks; its agent's log says why",
        ),
        Err(error) => Finding::fail("services", format!("{error:#}"), "see the findings about the nodes"),
    }
}

#[cfg(test)]
mod tests {
    use super::super::Level;
    use super::*;

    #[test]
    fn certificates_are_judged_by_their_last_day() {
        let at = |end| expiry(Path::new("a.crt"), end, 1_000_000).map(|finding| finding.level);
        assert_eq!(at(999_999), Some(Level::Fail));
        assert_eq!(at(1_000_000 + 29 * DAY_SECONDS), Some(Level::Warn));
        assert_eq!(at(1_000_000 + 31 * DAY_SECONDS), None);
        assert_eq!(ends_at(b"no certificate"), None);
    }

    #[test]
    fn leases_tell_of_the_dead_and_of_wrong_clocks() {
        let level = |renewed| lease_finding("node-1", renewed, 1_000).level;
        assert_eq!(level(Some(995)), Level::Ok);
        assert_eq!(level(Some(900)), Level::Fail);
        assert_eq!(level(Some(1_060)), Level::Warn);
        assert_eq!(level(None), Level::Fail);
    }
}
