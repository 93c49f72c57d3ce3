//! The steps of an answer, which of them decides, and how they are written.

use serde::Serialize;

/// How a step went.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub(crate) enum Verdict {
    /// It lets the connection pass.
    Ok,
    /// It lets it pass, and there is something to know.
    Note,
    /// It ends here.
    Fail,
}

/// A step on the way.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Step {
    /// What is looked at: name, service, backend, route …
    pub(crate) name: &'static str,
    /// On which node.
    pub(crate) node: Option<String>,
    pub(crate) verdict: Verdict,
    /// What was found.
    pub(crate) says: String,
    /// The object in the API that made it so.
    pub(crate) object: Option<String>,
}

impl Step {
    pub(crate) fn ok(name: &'static str, says: impl Into<String>) -> Self {
        Self { name, node: None, verdict: Verdict::Ok, says: says.into(), object: None }
    }

    pub(crate) fn note(name: &'static str, says: impl Into<String>) -> Self {
        Self { verdict: Verdict::Note, ..Self::ok(name, says) }
    }

    pub(crate) fn fail(name: &'static str, says: impl Into<String>) -> Self {
        Self { verdict: Verdict::Fail, ..Self::ok(name, says) }
    }

    pub(crate) fn on(self, node: &str) -> Self {
        Self { node: Some(node.to_owned()), ..self }
    }

    pub(crate) fn by(self, object: impl Into<Option<String>>) -> Self {
        Self { object: object.into(), ..self }
    }
}

/// How far a connection comes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub(crate) enum Outcome {
    /// Every way leads there.
    Reachable,
    /// Some backends, or the way over some nodes, do not work.
    Partly,
    /// It does not get there.
    Unreachable,
}

/// An answer.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Report {
    pub(crate) from: String,
    pub(crate) to: String,
    pub(crate) protocol: String,
    pub(crate) outcome: Outcome,
    /// The step that decides.
    pub(crate) decided_by: Option<Step>,
    pub(crate) steps: Vec<Step>,
}

impl Report {
    pub(crate) fn new(from: String, to: String, protocol: String) -> Self {
        Self { from, to, protocol, outcome: Outcome::Reachable, decided_by: None, steps: Vec::new() }
    }

    pub(crate) fn push(&mut self, step: Step) {
        self.steps.push(step);
    }

    /// Draws the conclusion: of `ways` (each tells whether it works), and of the first step that failed.
    pub(crate) fn conclude(&mut self, ways: &[bool]) {
        let failed = self.steps.iter().find(|step| step.verdict == Verdict::Fail);
        self.outcome = match (ways.iter().filter(|works| **works).count(), failed) {
            (0, _) => Outcome::Unreachable,
            (works, None) if works == ways.len() => Outcome::Reachable,
            (_, _) => Outcome::Partly,
        };
        // Where nothing fails, the step that chose the backend decides.
        let chose = || self.steps.iter().rev().find(|step| ["backend", "service"].contains(&step.name));
        self.decided_by = failed.or_else(chose).or(self.steps.last()).cloned();
    }

    pub(crate) fn render(&self) -> String {
        let mut text = format!("{} → {}/{}\n\n", self.from, self.to, self.protocol);
        let named = self.steps.iter().filter_map(|step| step.node.as_ref());
        let width = named.map(|node| node.chars().count()).max().unwrap_or(0);
        for step in &self.steps {
            let mark = match step.verdict {
                Verdict::Ok => ' ',
                Verdict::Note => '!',
                Verdict::Fail => '✗',
            };
            let node = step.node.as_deref().unwrap_or_default();
            let object = step.object.as_ref().map(|object| format!("   [{object}]")).unwrap_or_default();
            text.push_str(&format!("{mark} {:<8}  {node:<width$}  {}{object}\n", step.name, step.says));
        }
        text.push('\n');
        let by = self.decided_by.as_ref();
        text.push_str(&match (self.outcome, by) {
            (Outcome::Reachable, _) => "reachable\n".to_owned(),
            (Outcome::Partly, Some(step)) => format!("partly reachable: {}\n", step.sentence()),
            (Outcome::Unreachable, Some(step)) => format!("not reachable: {}\n", step.sentence()),
            (Outcome::Partly, None) => "partly reachable\n".to_owned(),
            (Outcome::Unreachable, None) => "not reachable\n".to_owned(),
        });
        text
    }
}

impl Step {
    /// The step in one line, for the conclusion.
    fn sentence(&self) -> String {
        let node = self.node.as_ref().map(|node| format!(" on {node}")).unwrap_or_default();
        let object = self.object.as_ref().map(|object| format!(" ({object})")).unwrap_or_default();
        format!("decided by {}{node}: {}{object}", self.name, self.says)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn report(steps: Vec<Step>, ways: &[bool]) -> Report {
        let mut report = Report::new("a".to_owned(), "b:80".to_owned(), "TCP".to_owned());
        report.steps = steps;
        report.conclude(ways);
        report
    }

    #[test]
    fn the_first_step_that_fails_decides() {
        let backend = || Step::ok("backend", "one of 2").on("node-1");
        let good = report(vec![backend(), Step::ok("route", "by weft0")], &[true]);
        assert_eq!(good.outcome, Outcome::Reachable);
        assert_eq!(good.decided_by.as_ref().unwrap().name, "backend");
        assert!(good.render().ends_with("reachable\n"), "{}", good.render());

        let failed = Step::fail("listen", "nothing listens").on("node-2").by("Pod default/b".to_owned());
        let partly = report(vec![backend(), failed.clone()], &[true, false]);
        assert_eq!(partly.outcome, Outcome::Partly);
        let none = report(vec![backend(), failed, Step::fail("route", "none")], &[false]);
        assert_eq!(none.outcome, Outcome::Unreachable);
        let text = none.render();
        assert!(
            text.ends_with("not reachable: decided by listen on node-2: nothing listens (Pod default/b)\n"),
            "{text}"
        );
    }
}
