//! The agent dies and comes back; the inits die; work is half done.

use std::fs;
use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use weft_agent_runtime::builtin::BuiltinRuntime;
use weft_agent_runtime::{ContainerState, Runtime, RuntimeEvent, SandboxSpec};
use weft_tests_harness::{require, wait_until};

use crate::node::{Node, PATIENCE, pod, script};

#[tokio::test]
async fn containers_outlive_the_agent_with_logs_and_codes() {
    if !require("containers_outlive_the_agent_with_logs_and_codes", &["root"]) {
        return;
    }
    let mut node = Node::new().await;
    let sandbox = node.sandbox().await;
    let ends = node
        .start(
            &sandbox,
            script("ends", "while ! test -e /dev/shm/go; do sleep 0.02; done; echo last words; exit 9"),
        )
        .await;
    let stays = node.start(&sandbox, script("stays", "while :; do echo tick; sleep 0.05; done")).await;
    let created = node.runtime().create_container(&sandbox, script("created", "echo late")).await.unwrap();
    let before = node.runtime().list_sandboxes().await.unwrap();
    let ContainerState::Running { started_at_ns } = node.runtime().container(&stays).await.unwrap().state
    else {
        panic!()
    };
    assert_eq!(node.exec(&stays, &["touch", "/dev/shm/go"]).await.0, 0);

    // The agent is away while one ends and the other talks on.
    node.runtime = None;
    let exit = node
        .folder
        .path()
        .join("data/nodes")
        .join(&node.config.node_name)
        .join("containers")
        .join(&ends)
        .join("exit.json");
    wait_until("the container has ended", PATIENCE, || Ok(exit.exists().then_some(()))).unwrap();
    let said = node.output("stays").len();
    wait_until("the log grows", PATIENCE, || Ok((node.output("stays").len() > said).then_some(()))).unwrap();

    node.runtime = Some(BuiltinRuntime::open(node.config.clone()).await.unwrap());
    assert_eq!(node.runtime().list_sandboxes().await.unwrap(), before);
    assert_eq!(node.exit(&ends).await.code, 9);
    assert_eq!(node.output("ends"), "last words\n");
    assert_eq!(
        node.runtime().container(&stays).await.unwrap().state,
        ContainerState::Running { started_at_ns }
    );
    assert_eq!(node.runtime().container(&created).await.unwrap().state, ContainerState::Created);
    node.runtime().start_container(&created).await.unwrap();
    assert_eq!(node.exit(&created).await.code, 0);
    assert_eq!(node.exec(&stays, &["echo", "hi"]).await, (0, "hi\n".to_owned()));
    node.finish().await;
}

#[tokio::test]
async fn the_death_of_an_init_ends_its_pod() {
    if !require("the_death_of_an_init_ends_its_pod", &["root"]) {
        return;
    }
    let node = Node::new().await;
    let sandbox = node.sandbox().await;
    let id = node.start(&sandbox, script("c", "exec sleep 1000")).await;
    let mut events = node.runtime().events();
    let pid = node.runtime().sandbox_pid(&sandbox).await.unwrap();
    kill(Pid::from_raw(pid), Signal::SIGKILL).unwrap();
    let exited = RuntimeEvent::ContainerExited { pod_uid: "uid-1".to_owned(), container_id: id.clone() };
    let died = RuntimeEvent::SandboxDied { pod_uid: "uid-1".to_owned(), sandbox_id: sandbox.clone() };
    assert_eq!([events.recv().await.unwrap(), events.recv().await.unwrap()], [exited, died]);
    assert_eq!(node.exit(&id).await.code, 137);
    assert!(!node.runtime().list_sandboxes().await.unwrap()[0].ready);
    let group = node
        .config
        .cgroup_root
        .join("unified")
        .join(&node.config.cgroup_parent)
        .join("burstable/poduid-1")
        .join(&id);
    let empty =
        || Ok(fs::read_to_string(group.join("cgroup.procs")).unwrap_or_default().is_empty().then_some(()));
    wait_until("the container's process is gone", PATIENCE, empty).unwrap();
    assert!(node.runtime().create_container(&sandbox, script("d", "true")).await.is_err());
    node.runtime().stop_sandbox(&sandbox).await.unwrap();
    node.runtime().remove_sandbox(&sandbox).await.unwrap();
    node.runtime().remove_sandbox(&sandbox).await.unwrap();
    assert!(node.runtime().list_containers().await.unwrap().is_empty());
    let calls = fs::read_to_string(node.plugin_log()).unwrap();
    assert!(calls.lines().any(|line| line.starts_with(&format!("DEL {sandbox} eth0 /"))), "{calls}");
    node.finish().await;
}

#[tokio::test]
async fn after_a_restart_of_the_machine_everything_is_exited_and_removable() {
    if !require("after_a_restart_of_the_machine_everything_is_exited_and_removable", &["root"]) {
        return;
    }
    let mut node = Node::new().await;
    let sandbox = node.sandbox().await;
    let id = node.start(&sandbox, script("c", "exec sleep 1000")).await;
    let pid = node.runtime().sandbox_pid(&sandbox).await.unwrap();
    node.runtime = None;
    kill(Pid::from_raw(pid), Signal::SIGKILL).unwrap();
    let run = node.config.run_dir.join(&node.config.node_name);
    for mount in [run.join("netns").join(&sandbox), run.join("sandboxes").join(&sandbox).join("shm")] {
        nix::mount::umount2(&mount, nix::mount::MntFlags::MNT_DETACH).unwrap();
    }
    fs::remove_dir_all(&run).unwrap();

    node.restart().await;
    let found = node.runtime().list_sandboxes().await.unwrap();
    assert!(found.len() == 1 && !found[0].ready);
    assert_eq!(node.exit(&id).await.code, 137);
    node.runtime().remove_sandbox(&sandbox).await.unwrap();
    let calls = fs::read_to_string(node.plugin_log()).unwrap();
    assert!(
        calls.lines().any(|line| line.starts_with(&format!("DEL {sandbox} eth0  IgnoreUnknown"))),
        "{calls}"
    );
    node.finish().await;
}

#[tokio::test]
async fn half_made_things_are_undone() {
    if !require("half_made_things_are_undone", &["root"]) {
        return;
    }
    let mut node = Node::new().await;
    let sandbox = node.sandbox().await;
    let data = node.folder.path().join("data/nodes").join(&node.config.node_name);
    let record = data.join("sandboxes").join(&sandbox).join("record.json");
    let pid = node.runtime().sandbox_pid(&sandbox).await.unwrap();
    node.runtime = None;
    // As a kill between ADD and the last record leaves it.
    let text = fs::read_to_string(&record).unwrap().replace("\"Ready\"", "\"Creating\"");
    fs::write(&record, text).unwrap();
    fs::create_dir_all(data.join("containers").join("f".repeat(64)).join("upper")).unwrap();
    fs::create_dir_all(data.join("sandboxes").join("e".repeat(64))).unwrap();
    let orphan = node
        .config
        .cgroup_root
        .join("unified")
        .join(&node.config.cgroup_parent)
        .join("besteffort/podx")
        .join("a".repeat(64));
    if node.config.cgroup_root.join("unified").exists() {
        fs::create_dir_all(&orphan).unwrap();
    }

    node.restart().await;
    assert!(node.runtime().list_sandboxes().await.unwrap().is_empty());
    assert!(
        !Path::new(&format!("/proc/{pid}")).exists()
            || fs::read_to_string(format!("/proc/{pid}/stat")).unwrap().contains(") Z ")
    );
    assert_eq!(fs::read_dir(data.join("containers")).unwrap().count(), 0);
    assert_eq!(fs::read_dir(data.join("sandboxes")).unwrap().count(), 0);
    assert!(!orphan.exists());
    let calls = fs::read_to_string(node.plugin_log()).unwrap();
    assert!(calls.contains(&format!("DEL {sandbox}")), "{calls}");
    node.finish().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn many_pods_come_and_go_at_once() {
    if !require("many_pods_come_and_go_at_once", &["root"]) {
        return;
    }
    let node = std::sync::Arc::new(Node::new().await);
    let mut tasks = tokio::task::JoinSet::new();
    for number in 0..20 {
        let node = node.clone();
        tasks.spawn(async move {
            let mut pod = node.pod();
            (pod.uid, pod.cgroup) = (format!("uid-{number}"), format!("burstable/pod{number}"));
            let sandbox = node.runtime().run_sandbox(pod).await.unwrap().id;
            let name = format!("c{number}");
            let id = node.start(&sandbox, script(&name, &format!("echo {number}; exit {number}"))).await;
            assert_eq!(node.exit(&id).await.code, number);
            assert_eq!(node.output(&name), format!("{number}\n"));
            node.runtime().stop_sandbox(&sandbox).await.unwrap();
            node.runtime().remove_sandbox(&sandbox).await.unwrap();
        });
    }
    while let Some(result) = tasks.join_next().await {
        result.unwrap();
    }
    assert!(node.runtime().list_sandboxes().await.unwrap().is_empty());
    std::sync::Arc::into_inner(node).unwrap().finish().await;
}

/// Not a test of its own: the agent that `an_agent_killed_at_any_moment_leaves_nothing_half_done` kills.
#[tokio::test]
#[ignore = "runs as the victim of another test"]
async fn victim() {
    let Ok(folder) = std::env::var("WEFT_TEST_VICTIM") else { return };
    let config: Vec<String> = folder.split(':').map(str::to_owned).collect();
    let node = Node::at(&config[0], Path::new(&config[1]));
    let runtime = BuiltinRuntime::open(node).await.unwrap();
    println!("open");
    for number in 0.. {
        let pod = SandboxSpec { uid: format!("u{number}"), ..pod(Path::new(&config[1])) };
        let sandbox = runtime.run_sandbox(pod).await.unwrap().id;
        let id = runtime.create_container(&sandbox, script("c", "exec sleep 1000")).await.unwrap();
        runtime.start_container(&id).await.unwrap();
        if number % 2 == 0 {
            runtime.remove_sandbox(&sandbox).await.unwrap();
        }
    }
}

#[tokio::test]
async fn an_agent_killed_at_any_moment_leaves_nothing_half_done() {
    if !require("an_agent_killed_at_any_moment_leaves_nothing_half_done", &["root"]) {
        return;
    }
    let mut node = Node::new().await;
    node.runtime = None;
    let victim = format!("{}:{}", node.config.node_name, node.folder.path().display());
    for round in 0..25u64 {
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "restarts::victim", "--ignored", "--nocapture"])
            .env("WEFT_TEST_VICTIM", &victim)
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
        assert!(lines.any(|line| line.unwrap().ends_with("open")), "the victim does not start");
        tokio::time::sleep(Duration::from_micros(1300 * round)).await;
        child.kill().unwrap();
        child.wait().unwrap();

        node.restart().await;
        let sandboxes = node.runtime().list_sandboxes().await.unwrap();
        let containers = node.runtime().list_containers().await.unwrap();
        for sandbox in sandboxes.iter().filter(|sandbox| sandbox.ready) {
            node.runtime().sandbox_pid(&sandbox.id).await.unwrap();
        }
        for container in &containers {
            let sandbox = sandboxes.iter().find(|sandbox| sandbox.id == container.sandbox_id).unwrap();
            if sandbox.ready && matches!(container.state, ContainerState::Running { .. }) {
                assert_eq!(node.exec(&container.id, &["true"]).await.0, 0);
            }
        }
        // All that runs is known: what isn't in a known group is in none.
        let known: Vec<&String> =
            sandboxes.iter().map(|s| &s.id).chain(containers.iter().map(|c| &c.id)).collect();
        let pods = node
            .config
            .cgroup_root
            .join("unified")
            .join(&node.config.cgroup_parent)
            .join("burstable/poduid-1");
        for group in fs::read_dir(pods).into_iter().flatten().flatten().filter(|entry| entry.path().is_dir())
        {
            assert!(known.iter().any(|id| group.file_name() == id.as_str()), "{group:?} has no owner");
        }
        node.runtime = None;
    }
    node.finish().await;
}
