//! Which machines there are, and what runs in each.

use super::job::Cgroups;

/// A kind of machine.
pub(super) struct Boot {
    pub(super) name: &'static str,
    pub(super) title: &'static str,
    pub(super) cgroups: Cgroups,
    /// Modules that the kernel doesn't load by itself when it is asked for what they do.
    pub(super) load: &'static [&'static str],
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
    /// Parts of the names of the tests that run; none stands for all.
    pub(super) tests: &'static [&'static str],
    /// What this machine lacks, with the reason: tests that need it may be skipped, others not.
    pub(super) lacks: &'static [(&'static str, &'static str)],
}

const BUILTIN: Run = Run {
    name: "builtin",
    package: "agent/runtime",
    test: "builtin",
    args: &[],
    tests: &[],
    lacks: &[("layers", "overlayfs takes layers one by one since Linux 6.7")],
};

const DATAPLANE: Run = Run {
    name: "dataplane",
    package: "tests/integration",
    test: "dataplane",
    args: &[],
    // One of each kind, those first that hook packets in another way than on newer kernels: loading the programs alone takes seconds.
    tests: &[
        "adoption::services_outlive_the_agent",
        "crossing::the_short_way_and_the_long_one",
        "direct::bodies",
        "direct::flows_outlive",
        "filters::",
        "overlay::pods_of_two_nodes",
        "packets::packets_to_services",
        "packets::programs_stay_far",
        "policy::policies_hold",
        "sctp::sockets",
        "services::every_address",
        "sockets::a_pod_is_served",
        "sockets::a_process_of_the_node",
    ],
    lacks: &[("tcx", "links for packets are there since Linux 6.6")],
};

/// From `weft up` to `weft down --purge`, as on a machine that is used for nothing else.
const WHOLE: Run = Run {
    name: "whole",
    package: "tests/e2e",
    test: "machine",
    args: &["--ignored"],
    tests: &[],
    lacks: &[],
};

pub(super) const BOOTS: &[Boot] = &[
    Boot {
        name: "v2",
        title: "cgroup version 2 alone",
        cgroups: Cgroups::V2,
        load: &["sctp"],
        runs: &[WHOLE, BUILTIN, DATAPLANE],
    },
    Boot { name: "v1", title: "cgroup version 1 alone", cgroups: Cgroups::V1, load: &[], runs: &[BUILTIN] },
];

/// All names that the command line takes.
pub(super) fn names() -> Vec<String> {
    let runs =
        |boot: &Boot| boot.runs.iter().map(|run| format!("{}/{}", boot.name, run.name)).collect::<Vec<_>>();
    BOOTS.iter().flat_map(|boot| std::iter::once(boot.name.to_owned()).chain(runs(boot))).collect()
}
