//! Which machines there are, and what runs in each.

use super::job::Cgroups;

/// A kind of machine.
pub(super) struct Boot {
    pub(super) name: &'static str,
    pub(super) title: &'static str,
    pub(super) cgroups: Cgroups,
    pub(super) runs: &'static [Run],
}

/// A test program, and what of it runs.
pub(super) struct Run {
    pub(super) name: &'static str,
    /// The package's folder in the workspace.
    pub(super) package: &'static str,
    /// The program's name in the package.
    pub(super) test: &'static str,
    pub(super) args: &'static [&'static str],
    /// What this machine lacks, with the reason: tests that need it may be skipped, others not.
    pub(super) lacks: &'static [(&'static str, &'static str)],
}

const BUILTIN: Run = Run {
    name: "builtin",
    package: "agent/runtime",
    test: "builtin",
    args: &[],
    lacks: &[("layers", "overlayfs takes layers one by one since Linux 6.7")],
};

pub(super) const BOOTS: &[Boot] = &[
    Boot { name: "v2", title: "cgroup version 2 alone", cgroups: Cgroups::V2, runs: &[BUILTIN] },
    Boot { name: "v1", title: "cgroup version 1 alone", cgroups: Cgroups::V1, runs: &[BUILTIN] },
];

/// All names that the command line takes.
pub(super) fn names() -> Vec<String> {
    let runs =
        |boot: &Boot| boot.runs.iter().map(|run| format!("{}/{}", boot.name, run.name)).collect::<Vec<_>>();
    BOOTS.iter().flat_map(|boot| std::iter::once(boot.name.to_owned()).chain(runs(boot))).collect()
}
