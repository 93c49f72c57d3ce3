//! What a container sees, says and returns.

use std::collections::BTreeSet;
use std::fs;
use std::time::{Duration, Instant};

use weft_agent_runtime::{
    ContainerSpec, ContainerState, Error, Mount, Propagation, Resources, Runtime, SandboxSpec, Stdio,
};
use weft_tests_harness::require;

use crate::node::{Node, script};

#[tokio::test]
async fn output_becomes_a_cri_log_and_the_code_is_kept() {
    if !require("output_becomes_a_cri_log_and_the_code_is_kept", &["root"]) {
        return;
    }
    let node = Node::new().await;
    let (exit, output) = node.run(script("c", "echo hello; echo oops >&2; printf rest; exit 7")).await;
    assert_eq!((exit.code, exit.oom_killed, exit.message.as_str()), (7, false, ""));
    assert!(exit.started_at_ns > 0 && exit.finished_at_ns >= exit.started_at_ns);
    let lines: BTreeSet<&str> = output.lines().collect();
    assert_eq!(lines, BTreeSet::from(["hello", "oops", "rest"]));
    let log = node.log("c");
    let first = log.lines().next().unwrap();
    let time = first.split(' ').next().unwrap();
    assert!(
        time.parse::<jiff::Timestamp>().is_ok() && time.len() == "2026-01-02T03:04:05.123456789Z".len(),
        "{time}"
    );
    assert!(
        log.contains(" stdout F hello\n")
            && log.contains(" stderr F oops\n")
            && log.contains(" stdout P rest\n")
    );
    node.finish().await;
}

#[tokio::test]
async fn image_and_pod_give_the_environment_and_the_working_folder() {
    if !require("image_and_pod_give_the_environment_and_the_working_folder", &["root"]) {
        return;
    }
    let node = Node::new().await;
    let mut spec = script(
        "c",
        "env; pwd; hostname; cat /etc/resolv.conf; echo pid $$; id -u; ls /dev; readlink /dev/fd",
    );
    spec.env = vec![("FROM".to_owned(), "pod".to_owned()), ("EMPTY".to_owned(), String::new())];
    spec.working_dir = "/made/here".to_owned();
    let (exit, output) = node.run(spec).await;
    assert_eq!(exit.code, 0, "{output}");
    let lines: Vec<&str> = output.lines().collect();
    for line in [
        "FROM=pod",
        "KEEP=1",
        "EMPTY=",
        "HOME=/root",
        "HOSTNAME=podhost",
        "/made/here",
        "podhost",
        "nameserver 10.43.0.10",
        "pid 1",
        "0",
        "null",
        "/proc/self/fd",
    ] {
        assert!(lines.contains(&line), "{line:?} is missing in {output}");
    }
    assert!(!lines.contains(&"FROM=image") && !lines.contains(&"vda"));
    node.finish().await;
}

#[tokio::test]
async fn what_can_not_start_says_why() {
    if !require("what_can_not_start_says_why", &["root"]) {
        return;
    }
    let node = Node::new().await;
    let sandbox = node.sandbox().await;
    for (command, message) in [
        ("no-such", r#"exec: "no-such": executable file not found in $PATH"#),
        ("/no/such", r#"exec: "/no/such": stat /no/such: no such file or directory"#),
        ("/etc/passwd", r#"exec: "/etc/passwd": permission denied"#),
        ("/etc", r#"exec: "/etc": is a directory"#),
    ] {
        let spec = ContainerSpec { command: vec![command.to_owned()], ..script("c", "") };
        let id = node.runtime().create_container(&sandbox, spec).await.unwrap();
        let error = node.runtime().start_container(&id).await.unwrap_err();
        assert!(matches!(&error, Error::Start { reason, .. } if reason == message), "{error}");
        let ContainerState::Exited(exit) = node.runtime().container(&id).await.unwrap().state else {
            panic!()
        };
        assert_eq!((exit.code, exit.message.as_str()), (128, message));
        node.runtime().remove_container(&id).await.unwrap();
    }
    let missing = ContainerSpec { image: "nope:1".to_owned(), ..script("c", "") };
    let error = node.runtime().create_container(&sandbox, missing).await.unwrap_err();
    assert!(matches!(error, Error::NotFound { what: "image", .. }), "{error}");
    let escape = ContainerSpec { log_path: "../../x".into(), ..script("c", "") };
    assert!(matches!(node.runtime().create_container(&sandbox, escape).await, Err(Error::Invalid { .. })));
    assert!(node.runtime().list_containers().await.unwrap().is_empty());
    node.finish().await;
}

#[tokio::test]
async fn exec_joins_the_container() {
    if !require("exec_joins_the_container", &["root"]) {
        return;
    }
    let node = Node::new().await;
    let sandbox = node.sandbox().await;
    let mut spec = script("c", "exec sleep 1000");
    spec.security.run_as_user = Some(33);
    spec.env = vec![("MARK".to_owned(), "x".to_owned())];
    let id = node.start(&sandbox, spec).await;
    let (code, output) = node
        .exec(
            &id,
            &["sh", "-c", "id -u; id -g; echo $MARK; ps | grep -c sleep; cat /proc/self/cgroup; exit 5"],
        )
        .await;
    assert_eq!(code, 5);
    assert!(output.starts_with("33\n34\nx\n"), "{output}");
    assert!(
        output
            .lines()
            .filter(|line| line.contains(":memory:") || line.starts_with("0::"))
            .all(|line| line.ends_with(":/")),
        "{output}"
    );

    let (mut input, output) = (std::io::pipe().unwrap(), std::io::pipe().unwrap());
    let stdio = Stdio { stdin: Some(input.0.into()), stdout: Some(output.1.into()), ..Stdio::default() };
    std::io::Write::write_all(&mut input.1, b"to and fro").unwrap();
    drop(input.1);
    assert_eq!(node.runtime().exec(&id, vec!["cat".to_owned()], stdio).await.unwrap(), 0);
    assert_eq!(std::io::read_to_string(output.0).unwrap(), "to and fro");

    let error = node.runtime().exec(&id, vec!["nope".to_owned()], Stdio::default()).await.unwrap_err();
    assert!(error.to_string().ends_with(r#"exec: "nope": executable file not found in $PATH"#), "{error}");
    let killed = node.exec(&id, &["sh", "-c", "kill -9 $$"]).await;
    assert_eq!(killed.0, 137);
    node.finish().await;
}

#[tokio::test]
async fn an_abandoned_exec_is_killed() {
    if !require("an_abandoned_exec_is_killed", &["root"]) {
        return;
    }
    let node = Node::new().await;
    let sandbox = node.sandbox().await;
    let id = node.start(&sandbox, script("c", "exec sleep 1000")).await;
    let (read, write) = std::io::pipe().unwrap();
    let stdio = Stdio { stdout: Some(write.into()), ..Stdio::default() };
    let command = vec!["sleep".to_owned(), "1001".to_owned()];
    let hang = node.runtime().exec(&id, command, stdio);
    assert!(tokio::time::timeout(Duration::from_millis(300), hang).await.is_err());
    // The pipe closes when the last process that holds it has ended.
    let end = tokio::task::spawn_blocking(move || std::io::read_to_string(read).unwrap());
    tokio::time::timeout(crate::node::PATIENCE, end).await.unwrap().unwrap();
    node.finish().await;
}

#[tokio::test]
async fn stopping_asks_first_and_kills_after_the_grace() {
    if !require("stopping_asks_first_and_kills_after_the_grace", &["root"]) {
        return;
    }
    let node = Node::new().await;
    let sandbox = node.sandbox().await;
    let polite = node
        .start(
            &sandbox,
            script("polite", "trap 'echo bye; exit 3' TERM; echo up; while :; do sleep 0.05; done"),
        )
        .await;
    let deaf =
        node.start(&sandbox, script("deaf", "trap '' TERM; echo up; while :; do sleep 0.05; done")).await;
    let up = || {
        anyhow::Ok((node.output("polite").contains("up") && node.output("deaf").contains("up")).then_some(()))
    };
    weft_tests_harness::wait_until("both are up", crate::node::PATIENCE, up).unwrap();
    node.runtime().stop_container(&polite, Duration::from_secs(10)).await.unwrap();
    assert_eq!(node.exit(&polite).await.code, 3);
    assert_eq!(node.output("polite"), "up\nbye\n");
    let before = Instant::now();
    node.runtime().stop_container(&deaf, Duration::from_millis(500)).await.unwrap();
    assert!(before.elapsed() >= Duration::from_millis(500));
    assert_eq!(node.exit(&deaf).await.code, 137);
    node.runtime().stop_container(&deaf, Duration::from_secs(1)).await.unwrap();
    node.finish().await;
}

#[tokio::test]
async fn limits_are_written_and_memory_is_enforced() {
    if !require("limits_are_written_and_memory_is_enforced", &["root"]) {
        return;
    }
    let node = Node::new().await;
    let sandbox = node.sandbox().await;
    let mut spec = script(
        "c",
        "cat /sys/fs/cgroup/memory/memory.limit_in_bytes /sys/fs/cgroup/memory.max 2>/dev/null; echo ready; dd if=/dev/zero of=/dev/null bs=200M count=1",
    );
    spec.resources = Resources {
        cpu_shares: Some(512),
        cpu_quota_us: Some(50_000),
        cpu_period_us: Some(100_000),
        memory_limit_bytes: Some(64 << 20),
        pids_limit: Some(50),
        oom_score_adj: Some(900),
    };
    let id = node.start(&sandbox, spec).await;
    let exit = node.exit(&id).await;
    assert!(exit.oom_killed, "{exit:?} {}", node.output("c"));
    assert_ne!(exit.code, 0);
    assert!(node.output("c").starts_with("67108864\nready\n"), "{}", node.output("c"));
    let group = node.config.cgroup_parent.join("burstable/poduid-1").join(&id);
    for (files, value) in [
        ([("cpu", "cpu.shares"), ("", "cpu.weight")], ["512", "20"]),
        ([("cpu", "cpu.cfs_quota_us"), ("", "cpu.max")], ["50000", "50000 100000"]),
        ([("pids", "pids.max"), ("", "pids.max")], ["50", "50"]),
    ] {
        let read = files.map(|(mount, file)| {
            fs::read_to_string(node.config.cgroup_root.join(mount).join(&group).join(file)).ok()
        });
        let found = read.iter().zip(value).any(|(read, value)| read.as_deref().map(str::trim) == Some(value));
        assert!(found, "{files:?} are {read:?}");
    }
    node.finish().await;
}

#[tokio::test]
async fn a_process_is_in_its_cgroups_everywhere() {
    if !require("a_process_is_in_its_cgroups_everywhere", &["root"]) {
        return;
    }
    let node = Node::new().await;
    let sandbox = node.sandbox().await;
    let id = node.start(&sandbox, script("c", "exec sleep 1000")).await;
    let group = node.config.cgroup_parent.join("burstable/poduid-1").join(&id);
    let mut seen = 0;
    for mount in ["unified", "memory", "pids", "cpu", "cpuset", "freezer", "devices", ""] {
        let file = node.config.cgroup_root.join(mount).join(&group).join("cgroup.procs");
        if let Ok(processes) = fs::read_to_string(&file) {
            assert_eq!(processes.lines().count(), 1, "{}", file.display());
            seen += 1;
        }
    }
    assert!(seen > 0);
    let init = node.runtime().sandbox_pid(&sandbox).await.unwrap();
    assert_eq!(fs::read_to_string(format!("/proc/{init}/comm")).unwrap(), "weft-init\n");
    let place = || fs::read_to_string(format!("/proc/{init}/cgroup")).unwrap();
    // Without a mount of version 2 nothing can be put into its groups, which the kernel lists all the same.
    let has_v2 = ["unified/cgroup.procs", "cgroup.procs"]
        .iter()
        .any(|file| node.config.cgroup_root.join(file).exists());
    let of_interest = |line: &&str| line.contains(":memory:") || (has_v2 && line.starts_with("0::"));
    let joined =
        || Ok(place().lines().filter(of_interest).all(|line| line.ends_with(&sandbox)).then_some(()));
    weft_tests_harness::wait_until("the init is in its groups", crate::node::PATIENCE, joined).unwrap();
    node.finish().await;
}

#[tokio::test]
async fn mounts_are_read_only_recursive_and_contained() {
    if !require("mounts_are_read_only_recursive_and_contained", &["root"]) {
        return;
    }
    let node = Node::new().await;
    let folder = node.folder.path().join("volume");
    fs::create_dir_all(folder.join("sub")).unwrap();
    fs::write(folder.join("file"), "data").unwrap();
    let mount = |host: &str, container: &str, read_only| Mount {
        host_path: folder.join(host),
        container_path: container.into(),
        read_only,
        propagation: Propagation::Private,
    };
    let mut spec = script(
        "c",
        "cat /one; cat /ro/file; touch /ro/x || echo refused; touch /rw/made && echo made; touch /dev/shm/x && echo shm; test -e /dev/termination-log && echo term",
    );
    spec.mounts = vec![
        mount("file", "/one", true),
        mount("", "/ro", true),
        mount("", "/rw", false),
        mount("file", "/dev/termination-log", false),
    ];
    let (exit, output) = node.run(spec).await;
    assert_eq!(exit.code, 0, "{output}");
    for word in ["datadata", "Read-only file system", "refused\n", "made\n", "shm\n", "term\n"] {
        assert!(output.contains(word), "{word:?} is missing in {output}");
    }
    assert!(folder.join("made").exists());

    let sandbox = node.sandbox().await;
    let mut evil = script("evil", "true");
    evil.mounts = vec![mount("", "/proc/sys", false)];
    let id = node.runtime().create_container(&sandbox, evil).await.unwrap();
    let error = node.runtime().start_container(&id).await.unwrap_err();
    assert!(error.to_string().contains("inside /proc"), "{error}");
    node.finish().await;
}

#[tokio::test]
async fn containers_of_a_pod_share_what_pods_share() {
    if !require("containers_of_a_pod_share_what_pods_share", &["root"]) {
        return;
    }
    let node = Node::new().await;
    let sandbox = node.sandbox().await;
    let one = node.start(&sandbox, script("one", "echo secret > /dev/shm/x; exec sleep 1000")).await;
    let two = node.start(&sandbox, script("two", "exec sleep 1000")).await;
    let seen = async { while node.exec(&two, &["cat", "/dev/shm/x"]).await.1 != "secret\n" {} };
    tokio::time::timeout(crate::node::PATIENCE, seen).await.unwrap();
    let namespaces = ["readlink", "/proc/self/ns/net", "/proc/self/ns/ipc", "/proc/self/ns/uts"];
    assert_eq!(node.exec(&one, &namespaces).await.1, node.exec(&two, &namespaces).await.1);
    assert_ne!(
        node.exec(&one, &["readlink", "/proc/self/ns/pid"]).await.1,
        node.exec(&two, &["readlink", "/proc/self/ns/pid"]).await.1
    );
    let (_, lo) = node.exec(&one, &["ip", "addr", "show", "lo"]).await;
    assert!(lo.contains("127.0.0.1/8") && lo.contains("UP"), "{lo}");
    node.finish().await;
}

#[tokio::test]
async fn a_pod_may_use_the_nodes_namespaces() {
    if !require("a_pod_may_use_the_nodes_namespaces", &["root"]) {
        return;
    }
    let node = Node::new().await;
    let pod = SandboxSpec { host_network: true, host_pid: true, host_ipc: true, ..node.pod() };
    let sandbox = node.runtime().run_sandbox(pod).await.unwrap();
    assert!(sandbox.ips.is_empty());
    let calls = fs::read_to_string(node.plugin_log()).unwrap_or_default();
    assert!(!calls.contains("ADD"), "the plugin was called: {calls}");
    let id = node.start(&sandbox.id, script("c", "sleep 1000 & exec sleep 1000")).await;
    for namespace in ["net", "ipc", "uts", "pid"] {
        let link = format!("/proc/self/ns/{namespace}");
        let own = fs::read_link(&link).unwrap();
        assert_eq!(node.exec(&id, &["readlink", &link]).await.1.trim(), own.to_string_lossy());
    }
    node.runtime().stop_container(&id, Duration::ZERO).await.unwrap();
    node.runtime().remove_container(&id).await.unwrap();
    node.finish().await;
}

#[tokio::test]
async fn a_terminal_is_a_terminal() {
    if !require("a_terminal_is_a_terminal", &["root"]) {
        return;
    }
    let node = Node::new().await;
    let mut spec = script("c", "tty; test -t 1 && echo yes; echo $TERM");
    spec.tty = true;
    let (exit, output) = node.run(spec).await;
    assert_eq!((exit.code, output.replace('\r', "").as_str()), (0, "/dev/pts/0\nyes\nxterm\n"));

    let sandbox = node.sandbox().await;
    let id = node.start(&sandbox, script("d", "exec sleep 1000")).await;
    let pty = nix::pty::openpty(None, None).unwrap();
    let stdio = Stdio { tty: Some(pty.slave), ..Stdio::default() };
    let command = ["sh", "-c", "test -t 0 && echo terminal"].map(str::to_owned).to_vec();
    assert_eq!(node.runtime().exec(&id, command, stdio).await.unwrap(), 0);
    let mut bytes = [0; 64];
    let read = nix::unistd::read(&pty.master, &mut bytes).unwrap();
    assert_eq!(&bytes[..read], b"terminal\r\n");
    node.finish().await;
}

#[tokio::test]
async fn much_output_is_complete_and_rotated() {
    if !require("much_output_is_complete_and_rotated", &["root"]) {
        return;
    }
    let node = Node::new().await;
    let (exit, _) = node.run(script("c", "seq 1 1000000")).await;
    assert_eq!(exit.code, 0);
    let mut files: Vec<_> =
        fs::read_dir(node.folder.path().join("logs/c")).unwrap().map(|entry| entry.unwrap().path()).collect();
    // `0.log` is the newest; the others sort by time.
    files.sort();
    files.rotate_left(1);
    assert_eq!(files.len(), 5);
    let text: String = files.iter().map(|file| fs::read_to_string(file).unwrap()).collect();
    let numbers: Vec<u32> =
        text.lines().map(|line| line.rsplit(' ').next().unwrap().parse().unwrap()).collect();
    assert_eq!(numbers.last(), Some(&1_000_000));
    assert!(numbers.windows(2).all(|pair| pair[0] + 1 == pair[1]));
    node.finish().await;
}
