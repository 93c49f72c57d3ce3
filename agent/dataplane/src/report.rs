//! What this node says of its Services, on one line of its own Lease: all are programmed as they were at a resource version, but
//! for those that fail. A controller makes the Services' conditions of it; no node writes to a Service.

use std::collections::BTreeMap;
use std::time::Duration;

use k8s_openapi::api::coordination::v1::Lease;
use kube::api::{Patch, PatchParams};
use kube::{Api, Client};
use serde_json::json;
use tokio::sync::watch;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use crate::tables::ServiceName;

/// The annotation.
pub const ANNOTATION: &str = "weft.dev/services";
const NAMESPACE: &str = "kube-node-lease";
/// A report that is awaited is written after this at the soonest, so that changes at once are told at once.
const SOON: Duration = Duration::from_millis(100);
/// All nodes together write 50 reports a second at most.
const PER_NODE: Duration = Duration::from_millis(20);
/// A version that nobody waits for is written within this.
const SOME_TIME: Duration = Duration::from_secs(20);
/// First and longest wait after a failure: the Lease may not be there yet.
const RETRY_FIRST: Duration = Duration::from_millis(200);
const RETRY_LONGEST: Duration = Duration::from_secs(7);
/// Names and reasons are cut short behind this; a Lease may have 256 KiB of annotations, and is sent whole at each renewal.
const MAX_BYTES: usize = 32 << 10;

/// What there is to say.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Report {
    /// Newest resource version of a Service that was taken in; 0 while nothing is known.
    pub version: u64,
    /// The newest that had to be programmed: somebody waits for it.
    pub awaited: u64,
    /// Services that go on failing, and why.
    pub failing: BTreeMap<ServiceName, String>,
    /// Nodes of the cluster, with which the time between reports grows.
    pub nodes: usize,
}

impl Report {
    /// As it stands on the Lease: a list of names for each reason.
    #[must_use]
    pub fn encode(&self) -> String {
        let mut by_reason: BTreeMap<&str, Vec<String>> = BTreeMap::new();
        let (mut bytes, mut more) = (0, 0);
        for (service, reason) in &self.failing {
            let name = service.to_string();
            let known = by_reason.contains_key(reason.as_str());
            let cost = name.len() + if known { 0 } else { reason.len() };
            if bytes + cost > MAX_BYTES {
                more += 1;
                continue;
            }
            bytes += cost;
            by_reason.entry(reason).or_default().push(name);
        }
        json!({"version": self.version.to_string(), "failing": by_reason, "more": more}).to_string()
    }

    /// Whether somebody waits to hear this, after that.
    fn is_news_after(&self, written: &Self) -> bool {
        self.awaited > written.version || self.failing != written.failing
    }
}

/// Writes the reports of a node to its Lease, with its kubelet's identity, until `shutdown` or the sender goes.
pub async fn keep(
    client: Client,
    node_name: String,
    mut reports: watch::Receiver<Report>,
    shutdown: CancellationToken,
) {
    let api: Api<Lease> = Api::namespaced(client, NAMESPACE);
    shutdown.run_until_cancelled(write(&api, &node_name, &mut reports)).await;
}

async fn write(api: &Api<Lease>, node_name: &str, reports: &mut watch::Receiver<Report>) {
    let (mut written, mut retry) = (Report::default(), RETRY_FIRST);
    loop {
        let due = |report: &Report, since: Instant| {
            let soon = SOON.max(PER_NODE * u32::try_from(report.nodes).unwrap_or(u32::MAX));
            since + if report.is_news_after(&written) { soon } else { SOME_TIME }
        };
        if reports.wait_for(|report| report.version > 0 && !same(report, &written)).await.is_err() {
            return;
        }
        let since = Instant::now();
        // What becomes news meanwhile is not kept waiting as long as what was none.
        loop {
            let at = due(&reports.borrow_and_update(), since);
            tokio::select! {
                () = tokio::time::sleep_until(at) => break,
                changed = reports.changed() => if changed.is_err() { return },
            }
        }
        let report = reports.borrow_and_update().clone();
        let patch = json!({"metadata": {"annotations": {ANNOTATION: report.encode()}}});
        match api.patch(node_name, &PatchParams::default(), &Patch::Merge(patch)).await {
            Ok(_) => (written, retry) = (report, RETRY_FIRST),
            Err(error) => {
                tracing::debug!(%error, "cannot report on the node's Services, will be tried again");
                tokio::time::sleep(retry).await;
                retry = (retry * 2).min(RETRY_LONGEST);
            }
        }
    }
}

/// Nothing of it would be written otherwise.
fn same(report: &Report, written: &Report) -> bool {
    report.version == written.version && report.failing == written.failing
}

#[cfg(test)]
mod tests {
    use super::*;

    fn failing(count: usize, reason: &str) -> Report {
        let name = |i| ServiceName::new("default", &format!("service-{i:05}"));
        let failing = (0..count).map(|i| (name(i), reason.to_owned())).collect();
        Report { version: 7, awaited: 7, failing, nodes: 3 }
    }

    #[test]
    fn a_report_names_what_fails_by_its_reason() {
        assert_eq!(
            Report { version: 9, ..Report::default() }.encode(),
            r#"{"failing":{},"more":0,"version":"9"}"#
        );
        let expected = r#"{"failing":{"map is full":["default/service-00000","default/service-00001"]},"more":0,"version":"7"}"#;
        assert_eq!(failing(2, "map is full").encode(), expected);
    }

    #[test]
    fn a_long_list_is_cut_short_and_says_so() {
        let text = failing(10_000, "map is full").encode();
        assert!(text.len() < 2 * MAX_BYTES, "{}", text.len());
        let value: serde_json::Value = serde_json::from_str(&text).unwrap();
        let named = value["failing"]["map is full"].as_array().unwrap().len();
        assert!(named > 1_000);
        assert_eq!(value["more"], 10_000 - named);
    }

    #[test]
    fn a_version_that_nobody_waits_for_is_no_news() {
        let written = failing(1, "map is full");
        let later = Report { version: 8, ..written.clone() };
        assert!(!later.is_news_after(&written) && !same(&later, &written));
        assert!(Report { awaited: 8, ..later.clone() }.is_news_after(&written));
        assert!(Report { failing: BTreeMap::new(), ..later }.is_news_after(&written));
    }
}
