//! What the pods said, as lines of a table. Pure.

use serde::Serialize;

use super::manifest::Target;
use crate::net::table::Table;

/// How a check went.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub(super) enum Outcome {
    Ok,
    Failed(String),
}

/// A check.
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Line {
    /// `pod`, `body`, `service`, `nodeport`, `dns` or `hairpin`.
    pub(super) check: &'static str,
    pub(super) from: String,
    pub(super) to: String,
    pub(super) outcome: Outcome,
}

impl Line {
    /// In the order in which one thing needs the other.
    pub(super) fn order(&self) -> usize {
        ["pod", "body", "service", "hairpin", "nodeport", "dns"]
            .iter()
            .position(|name| *name == self.check)
            .unwrap_or(9)
    }
}

/// What a script said of one thing: the text behind `RESULT <name> `.
pub(super) fn result_of<'a>(log: &'a str, name: &str) -> Option<&'a str> {
    let mut lines = log.lines().filter_map(|line| line.strip_prefix("RESULT "));
    lines.find_map(|line| match line.split_once(' ') {
        Some((found, rest)) if found == name => Some(rest.trim()),
        None if line == name => Some(""),
        _ => None,
    })
}

/// The lines of one client.
pub(super) fn of_client(node: &str, targets: &[Target], log: &str) -> Vec<Line> {
    let line = |(number, target): (usize, &Target)| {
        let outcome = match result_of(log, &number.to_string()) {
            None => Outcome::Failed("the pod did not come to ask".to_owned()),
            Some(said) => match said.split_once(' ').unwrap_or((said, "")) {
                ("ok", answer) => target.judge(Ok(answer)),
                (_, error) => target.judge(Err(error)),
            },
        };
        Line { check: target.check, from: format!("pod on {node}"), to: target.to.clone(), outcome }
    };
    targets.iter().enumerate().map(line).collect()
}

/// The line of a server that asked itself.
pub(super) fn hairpin(node: &str, server: &str, said: Option<String>) -> Line {
    let outcome = match said {
        Some(said) if said == server => Outcome::Ok,
        Some(said) if said.is_empty() => Outcome::Failed("no answer".to_owned()),
        Some(said) => Outcome::Failed(said),
        None => Outcome::Failed("the pod did not come to ask".to_owned()),
    };
    Line {
        check: "hairpin",
        from: format!("pod on {node}"),
        to: "itself, by its Service".to_owned(),
        outcome,
    }
}

/// The line of a node's own process.
pub(super) fn from_host(node: &str, target: &Target, outcome: Outcome) -> Line {
    Line { check: target.check, from: format!("node {node}"), to: target.to.clone(), outcome }
}

pub(super) fn render(lines: &[Line], nodes: usize) -> String {
    let mut table = Table::new(&["CHECK", "FROM", "TO", "RESULT"]);
    for line in lines {
        let result = match &line.outcome {
            Outcome::Ok => "ok".to_owned(),
            Outcome::Failed(why) => format!("FAILED: {why}"),
        };
        table.row([line.check.to_owned(), line.from.clone(), line.to.clone(), result]);
    }
    let failed = lines.iter().filter(|line| line.outcome != Outcome::Ok).count();
    let mut text = table.render();
    text.push_str(&match failed {
        0 => format!("\n{} checks over {nodes} node(s), all of them ok\n", lines.len()),
        _ => format!(
            "\n{failed} of {} checks failed; with --keep the pods stay, for `weft why` to say more\n",
            lines.len()
        ),
    });
    text
}

#[cfg(test)]
mod tests {
    use std::net::SocketAddr;

    use super::*;

    #[test]
    fn a_log_is_read_by_number() {
        let at = |last| SocketAddr::from(([10, 42, 0, last], 8080));
        let targets = [
            Target::pod("a", at(2), "server-0"),
            Target::pod("b", at(3), "server-1"),
            Target::name("all.x.svc.cluster.local", [10, 43, 0, 7].into()),
            Target::pod("c", at(4), "server-2"),
            Target::node_port("a", at(1)),
        ];
        let log = "noise\nRESULT 0 ok server-0\nRESULT 1 fail wget: can't connect: Connection refused\n\
                   RESULT 2 ok Server: 10.43.0.10 Address: 10.43.0.7\nRESULT 4 fail\n";
        let outcomes: Vec<Outcome> =
            of_client("a", &targets, log).into_iter().map(|line| line.outcome).collect();
        let failed = |text: &str| Outcome::Failed(text.to_owned());
        assert_eq!(
            outcomes,
            [
                Outcome::Ok,
                failed("wget: can't connect: Connection refused"),
                Outcome::Ok,
                failed("the pod did not come to ask"),
                failed("no answer in 5 s"),
            ]
        );
        assert_eq!(hairpin("a", "server-0", Some("server-0".to_owned())).outcome, Outcome::Ok);
        assert_eq!(hairpin("a", "server-0", Some(String::new())).outcome, failed("no answer"));
        assert_eq!(result_of("RESULT hairpin \n", "hairpin"), Some(""));
        assert_eq!(result_of("RESULT 11 ok x\n", "1"), None);
    }

    #[test]
    fn a_wrong_server_is_no_success() {
        let target = Target::pod("a", SocketAddr::from(([10, 42, 0, 2], 8080)), "server-0");
        assert_eq!(
            target.judge(Ok("server-1")),
            Outcome::Failed("answered \"server-1\", not \"server-0\"".to_owned())
        );
    }
}
