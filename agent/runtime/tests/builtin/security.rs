//! Who a container is and what it can't do.

use std::fs;

use weft_agent_runtime::Runtime;
use weft_tests_harness::require;

use crate::node::{Node, script};

/// The capability line of /proc/self/status, without leading zeros.
fn capabilities(output: &str, kind: &str) -> u64 {
    let line = output
        .lines()
        .find_map(|line| line.strip_prefix(kind))
        .unwrap_or_else(|| panic!("no {kind} in {output}"));
    u64::from_str_radix(line.trim_start_matches(':').trim(), 16).unwrap()
}

#[tokio::test]
async fn users_and_groups_are_those_of_image_and_pod() {
    if !require("users_and_groups_are_those_of_image_and_pod", &["root"]) {
        return;
    }
    let node = Node::new().await;
    let mut spec = script(
        "c",
        "id -u; id -g; id -G; echo $HOME; touch /dev/stdout; echo to > /dev/stdout; touch /etc/x || echo refused",
    );
    spec.security.run_as_user = Some(33);
    spec.security.run_as_non_root = true;
    spec.security.supplemental_groups = vec![77];
    let (exit, output) = node.run(spec).await;
    assert_eq!(exit.code, 0);
    for line in ["33\n34\n34 50 77\n/var/www\n", "to\n", "refused\n"] {
        assert!(output.contains(line), "{line:?} is missing in {output}");
    }
    let mut root = script("root", "true");
    root.security.run_as_non_root = true;
    let sandbox = node.sandbox().await;
    let id = node.runtime().create_container(&sandbox, root).await.unwrap();
    let error = node.runtime().start_container(&id).await.unwrap_err();
    assert!(error.to_string().contains("runAsNonRoot"), "{error}");
    node.finish().await;
}

#[tokio::test]
async fn capabilities_are_the_default_set_and_go_with_the_user() {
    if !require("capabilities_are_the_default_set_and_go_with_the_user", &["root"]) {
        return;
    }
    let node = Node::new().await;
    let status = "cat /proc/self/status";
    // Without version 1's controller nothing says which devices may be opened, so none may be made.
    let may_make_devices = node.config.cgroup_root.join("devices").is_dir();
    let all = if may_make_devices { 0xa804_25fb } else { 0xa004_25fb };
    let (_, output) = node.run(script("root", status)).await;
    assert_eq!(capabilities(&output, "CapEff"), all);
    assert_eq!(capabilities(&output, "CapBnd"), all);
    assert_eq!(capabilities(&output, "CapInh") | capabilities(&output, "CapAmb"), 0);
    let mut user = script("user", status);
    user.security.run_as_user = Some(1000);
    user.security.no_new_privileges = true;
    user.security.add_capabilities = vec!["NET_ADMIN".to_owned()];
    user.security.drop_capabilities = vec!["ALL".to_owned()];
    let (_, output) = node.run(user).await;
    assert_eq!(capabilities(&output, "CapBnd"), 1 << 12);
    assert_eq!(capabilities(&output, "CapEff"), 0);
    assert!(output.contains("NoNewPrivs:\t1"), "{output}");
    node.finish().await;
}

#[tokio::test]
async fn the_node_is_out_of_reach() {
    if !require("the_node_is_out_of_reach", &["root"]) {
        return;
    }
    let node = Node::new().await;
    let text = "cat /proc/kcore | wc -c; echo 1 > /proc/sys/kernel/sysrq || echo sys; touch /sys/x || echo ro; \
        mkdir /sys/fs/cgroup/x /sys/fs/cgroup/memory/x 2>/dev/null || echo cgroup; \
        mknod /tmp/disk b 254 0 && head -c1 /tmp/disk > /dev/null || echo disk; \
        mknod /dev/disk b 254 0; head -c1 /dev/disk > /dev/null || echo devdisk; \
        mount -t tmpfs x /tmp || echo mount; hostname evil || echo name; echo end";
    let (exit, output) = node.run(script("c", text)).await;
    assert_eq!(exit.code, 0);
    for word in ["0", "sys", "ro", "cgroup", "disk", "devdisk", "mount", "name", "end"] {
        assert!(output.lines().any(|line| line == word), "{word:?} is missing in {output}");
    }
    node.finish().await;
}

#[tokio::test]
async fn a_read_only_root_is_read_only() {
    if !require("a_read_only_root_is_read_only", &["root"]) {
        return;
    }
    let node = Node::new().await;
    let mut spec = script(
        "c",
        "touch /x || echo refused; touch /dev/shm/x && echo shm; echo x > /dev/null && echo null",
    );
    spec.security.read_only_root = true;
    spec.working_dir = "/made".to_owned();
    let (exit, output) = node.run(spec).await;
    assert_eq!(exit.code, 0);
    assert!(output.contains("refused") && output.contains("shm") && output.contains("null"), "{output}");
    node.finish().await;
}

#[tokio::test]
async fn privileged_means_everything() {
    if !require("privileged_means_everything", &["root"]) {
        return;
    }
    let node = Node::new().await;
    let mut spec = script(
        "c",
        "mount -t tmpfs x /tmp && echo mounted; cat /proc/self/status; test -c /dev/kmsg && echo kmsg; touch /proc/sys/kernel/x; echo 0 > /proc/sys/net/ipv4/ip_forward && echo sysctl",
    );
    spec.security.privileged = true;
    let (_, output) = node.run(spec).await;
    let own = fs::read_to_string("/proc/self/status").unwrap();
    assert_eq!(capabilities(&output, "CapEff"), capabilities(&own, "CapEff"));
    assert!(output.contains("mounted") && output.contains("sysctl"), "{output}");
    assert_eq!(output.contains("kmsg"), std::path::Path::new("/dev/kmsg").exists());
    node.finish().await;
}

#[tokio::test]
async fn seccomp_refuses_namespaces_and_lets_programs_run() {
    if !require("seccomp_refuses_namespaces_and_lets_programs_run", &["root"]) {
        return;
    }
    let node = Node::new().await;
    for no_new_privileges in [false, true] {
        let mut spec = script(
            "c",
            "unshare -U true || echo refused; ls / | wc -l; cat /proc/self/status; sleep 0.01; echo done",
        );
        spec.security.seccomp_default = true;
        spec.security.no_new_privileges = no_new_privileges;
        spec.log_path = format!("c{no_new_privileges}/0.log").into();
        let sandbox = node.sandbox().await;
        let id = node.start(&sandbox, spec).await;
        assert_eq!(node.exit(&id).await.code, 0);
        let output = node.output(&format!("c{no_new_privileges}"));
        assert!(
            output.contains("Operation not permitted\nrefused\n") || output.contains("refused\n"),
            "{output}"
        );
        assert!(
            output.contains("Seccomp:\t2")
                && output.contains("Seccomp_filters:\t2")
                && output.contains("done"),
            "{output}"
        );
    }
    // Without a profile the same call is let through.
    let (_, output) = node.run(script("open", "unshare -U true && echo let")).await;
    assert_eq!(output, "let\n");
    node.finish().await;
}
