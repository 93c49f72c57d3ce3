//! `weft doctor`: what the cluster stands on, line by line, each with what to do about it.

mod cluster;
mod node;

use serde::Serialize;
use weft_agent_dataplane::observe::health::Health;
use weft_agent_dataplane::observe::wire::Request;

use super::Said;
use super::args::DoctorArgs;
use super::reach::Reach;
use super::table::Table;

/// How serious a finding is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
enum Level {
    Ok,
    /// It works, and should be looked at.
    Warn,
    /// Something does not work.
    Fail,
}

/// A line.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
struct Finding {
    level: Level,
    /// The node that it is about.
    node: Option<String>,
    /// What was looked at.
    what: &'static str,
    /// What was found.
    says: String,
    /// What to do.
    advice: Option<String>,
}

impl Finding {
    fn ok(what: &'static str, says: impl Into<String>) -> Self {
        Self { level: Level::Ok, node: None, what, says: says.into(), advice: None }
    }

    fn warn(what: &'static str, says: impl Into<String>, advice: impl Into<String>) -> Self {
        Self { level: Level::Warn, advice: Some(advice.into()), ..Self::ok(what, says) }
    }

    fn fail(what: &'static str, says: impl Into<String>, advice: impl Into<String>) -> Self {
        Self { level: Level::Fail, advice: Some(advice.into()), ..Self::ok(what, says) }
    }

    fn on(self, node: &str) -> Self {
        Self { node: Some(node.to_owned()), ..self }
    }
}

/// `weft doctor`.
pub(crate) async fn doctor(reach: &Reach, args: &DoctorArgs) -> anyhow::Result<Said> {
    let mut findings = cluster::certificates(reach);
    let api_nodes = match reach.api_nodes().await {
        Ok(nodes) => {
            findings.push(Finding::ok("api", "the API answers"));
            findings.extend(cluster::nodes(&nodes));
            findings.extend(cluster::leases(reach).await);
            findings.push(cluster::services(reach).await);
            nodes
        }
        Err(error) => {
            let advice = "start the cluster with `weft up`, or look into weft.log in the data directory";
            findings.push(Finding::fail("api", format!("{error:#}"), advice));
            Vec::new()
        }
    };
    for node in &reach.nodes {
        let mut own = Vec::new();
        if node.agent_answers() {
            own.push(Finding::ok("agent", "it answers"));
        } else {
            let advice = "start it again with `weft up`; until then the kernel goes on with the last state";
            own.push(Finding::fail("agent", "no agent answers on the node's socket", advice));
        }
        match node.ask::<Health>(&Request::Health) {
            Ok(health) => {
                own.extend(node::judge(&health));
                own.extend(node::peers(node, &api_nodes, &health));
            }
            Err(error) => {
                own.push(Finding::fail("node", format!("{error:#}"), "start its agent with `weft up`"))
            }
        }
        findings.extend(own.into_iter().map(|finding| finding.on(&node.name)));
    }
    let good = findings.iter().all(|finding| finding.level != Level::Fail);
    Said::new(good, args.output, render(&findings), &findings)
}

fn render(findings: &[Finding]) -> String {
    let mut table = Table::new(&["STATE", "NODE", "WHAT", "FOUND"]);
    for finding in findings {
        let state = match finding.level {
            Level::Ok => "ok",
            Level::Warn => "WARN",
            Level::Fail => "FAIL",
        };
        let advice = finding.advice.as_ref().map(|advice| format!(" → {advice}")).unwrap_or_default();
        table.row([
            state.to_owned(),
            finding.node.clone().unwrap_or_else(|| "-".to_owned()),
            finding.what.to_owned(),
            format!("{}{advice}", finding.says),
        ]);
    }
    let count = |level| findings.iter().filter(|finding| finding.level == level).count();
    format!(
        "{}\n{} ok, {} to look at, {} broken\n",
        table.render(),
        count(Level::Ok),
        count(Level::Warn),
        count(Level::Fail)
    )
}
