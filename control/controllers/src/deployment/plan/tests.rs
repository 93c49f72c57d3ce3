//! Owns the table tests of rollouts.

use super::*;
use k8s_openapi::api::apps::v1::{
    DeploymentSpec, DeploymentStrategy, ReplicaSetStatus, RollingUpdateDeployment,
};
use k8s_openapi::api::core::v1::{Container, PodSpec, PodTemplateSpec};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{LabelSelector, Time};
use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;

fn template(image: &str) -> PodTemplateSpec {
    let container = Container { name: "web".into(), image: Some(image.into()), ..Container::default() };
    PodTemplateSpec {
        metadata: Some(ObjectMeta { labels: Some(labels()), ..ObjectMeta::default() }),
        spec: Some(PodSpec { containers: vec![container], ..PodSpec::default() }),
    }
}

fn labels() -> BTreeMap<String, String> {
    [("app".to_owned(), "web".to_owned())].into()
}

fn int_or_percent(text: &str) -> Option<IntOrString> {
    Some(text.parse().map_or_else(|_| IntOrString::String(text.into()), IntOrString::Int))
}

/// A Deployment of image `new` that rolls.
pub(in super::super) fn deployment(replicas: i32, surge: &str, unavailable: &str) -> Deployment {
    let rolling = RollingUpdateDeployment {
        max_surge: int_or_percent(surge),
        max_unavailable: int_or_percent(unavailable),
    };
    Deployment {
        metadata: ObjectMeta {
            name: Some("web".into()),
            namespace: Some("default".into()),
            uid: Some("d".into()),
            generation: Some(2),
            ..ObjectMeta::default()
        },
        spec: Some(DeploymentSpec {
            replicas: Some(replicas),
            selector: LabelSelector { match_labels: Some(labels()), match_expressions: None },
            template: template("new"),
            strategy: Some(DeploymentStrategy {
                type_: Some("RollingUpdate".into()),
                rolling_update: Some(rolling),
            }),
            revision_history_limit: Some(10),
            progress_deadline_seconds: Some(600),
            ..DeploymentSpec::default()
        }),
        status: None,
    }
}

/// A ReplicaSet of an image, created at a second, with so many wanted and available pods.
fn set(image: &str, second: i64, replicas: i32, available: i32, d: &Deployment) -> Arc<ReplicaSet> {
    let wanted = math::wanted(d);
    let annotations = BTreeMap::from([
        (DESIRED.to_owned(), wanted.to_string()),
        (MAX_REPLICAS.to_owned(), (wanted + math::max_surge(d)).to_string()),
        (REVISION.to_owned(), second.to_string()),
    ]);
    Arc::new(ReplicaSet {
        metadata: ObjectMeta {
            name: Some(format!("web-{image}")),
            uid: Some(image.into()),
            resource_version: Some("7".into()),
            annotations: Some(annotations),
            creation_timestamp: Some(Time(Timestamp::from_second(second).unwrap())),
            ..ObjectMeta::default()
        },
        spec: Some(ReplicaSetSpec {
            replicas: Some(replicas),
            template: Some(template(image)),
            ..ReplicaSetSpec::default()
        }),
        status: Some(ReplicaSetStatus {
            replicas,
            ready_replicas: Some(available),
            available_replicas: Some(available),
            ..ReplicaSetStatus::default()
        }),
    })
}

fn step(d: &Deployment, sets: &[Arc<ReplicaSet>]) -> Plan {
    step_with_pods(d, sets, false)
}

fn step_with_pods(d: &Deployment, sets: &[Arc<ReplicaSet>], old_pods: bool) -> Plan {
    let now = Timestamp::from_second(1000).unwrap();
    plan(&Input { deployment: d, replica_sets: sets, old_pods_run: &|_| old_pods, now })
}

fn sizes(plan: &Plan) -> Vec<(String, i32)> {
    plan.patches.iter().filter_map(|p| Some((p.name.clone(), p.replicas?))).collect()
}

fn progressing(plan: &Plan) -> (String, String, String) {
    let status = plan.status.as_ref().and_then(|d| d.status.as_ref()).unwrap();
    let c = status::condition(status, "Progressing").unwrap();
    (c.status.clone(), c.reason.clone().unwrap(), c.message.clone().unwrap())
}

#[test]
fn a_new_deployment_gets_its_first_replica_set() {
    let plan = step(&deployment(2, "25%", "25%"), &[]);
    let rs = plan.create.as_ref().unwrap();
    let name = rs.metadata.name.clone().unwrap();
    let hash = name.strip_prefix("web-").unwrap().to_owned();
    assert_eq!(math::replicas(rs), 2);
    assert_eq!(rs.metadata.labels.as_ref().unwrap()[TEMPLATE_HASH], hash);
    let spec = rs.spec.as_ref().unwrap();
    assert_eq!(spec.selector.match_labels.as_ref().unwrap()[TEMPLATE_HASH], hash);
    assert_eq!(rs.metadata.annotations.as_ref().unwrap()[REVISION], "1");
    assert_eq!(rs.metadata.annotations.as_ref().unwrap()[MAX_REPLICAS], "3");
    assert_eq!(plan.events, [format!("Scaled up replica set {name} from 0 to 2")]);
    assert_eq!(plan.status.as_ref().unwrap().metadata.annotations.as_ref().unwrap()[REVISION], "1");
    let (status, reason, message) = progressing(&plan);
    assert_eq!((status.as_str(), reason.as_str()), ("True", "NewReplicaSetCreated"));
    assert_eq!(message, format!("Created new replica set \"{name}\""));
    assert!(plan.look_again.is_some());
}

#[test]
fn the_hash_follows_the_template_and_the_collision_count() {
    let hash = |image, count| revision::template_hash(&template(image), count);
    assert_eq!(hash("a", None), hash("a", None));
    assert_ne!(hash("a", None), hash("b", None));
    assert_ne!(hash("a", None), hash("a", Some(1)));
    assert!(hash("a", None).bytes().all(|b| b"bcdfghjklmnpqrstvwxz2456789".contains(&b)));
}

#[test]
fn a_rolling_update_stays_between_surge_and_unavailability() {
    // wanted, surge, unavailable, old (size, available), new (size, available) → sizes written
    type Row = (i32, &'static str, &'static str, (i32, i32), (i32, i32), &'static [(&'static str, i32)]);
    let rows: [Row; 9] = [
        (10, "0", "2", (10, 10), (0, 0), &[("web-old", 8)]),
        (10, "2", "0", (10, 10), (0, 0), &[("web-new", 2)]),
        (10, "2", "0", (10, 10), (2, 0), &[]),
        (10, "2", "0", (10, 10), (2, 2), &[("web-old", 8)]),
        (10, "25%", "25%", (10, 10), (0, 0), &[("web-new", 3)]),
        (10, "25%", "25%", (10, 10), (3, 0), &[("web-old", 8)]),
        // Pods of the old set that don't serve go before any that does.
        (10, "0", "2", (10, 7), (0, 0), &[("web-old", 8)]),
        (10, "1", "0", (2, 2), (9, 9), &[("web-old", 1)]),
        (10, "1", "0", (1, 1), (10, 10), &[("web-old", 0)]),
    ];
    for (wanted, surge, unavailable, old, new, expected) in rows {
        let d = deployment(wanted, surge, unavailable);
        let mut sets = vec![set("old", 1, old.0, old.1, &d)];
        if new.0 > 0 || surge != "0" {
            sets.push(set("new", 2, new.0, new.1, &d));
        } else {
            sets.push(set("new", 2, 0, 0, &d));
        }
        let written = sizes(&step(&d, &sets));
        let written: Vec<_> = written.iter().map(|(name, n)| (name.as_str(), *n)).collect();
        assert_eq!(written, expected, "{wanted} {surge} {unavailable} {old:?} {new:?}");
    }
}

#[test]
fn a_rollout_ends_and_says_so() {
    let d = deployment(2, "25%", "25%");
    let first = step(&d, &[set("new", 1, 2, 2, &d)]);
    let (status, reason, message) = progressing(&first);
    assert_eq!((status.as_str(), reason.as_str()), ("True", "NewReplicaSetAvailable"));
    assert_eq!(message, "ReplicaSet \"web-new\" has successfully progressed.");
    assert_eq!(first.look_again, None);
    let again = step(first.status.as_ref().unwrap(), &[set("new", 1, 2, 2, &d)]);
    assert!(again.status.is_none() && again.patches.is_empty() && again.create.is_none(), "{again:?}");
}

#[test]
fn a_rollout_that_stands_still_times_out() {
    let mut d = deployment(2, "25%", "25%");
    let sets = [set("new", 1, 2, 0, &d)];
    d.status = step(&d, &sets).status.unwrap().status;
    let now = Timestamp::from_second(1601).unwrap();
    let late = plan(&Input { deployment: &d, replica_sets: &sets, old_pods_run: &|_| false, now });
    let (status, reason, message) = progressing(&late);
    assert_eq!((status.as_str(), reason.as_str()), ("False", "ProgressDeadlineExceeded"));
    assert_eq!(message, "ReplicaSet \"web-new\" has timed out progressing.");
}

#[test]
fn going_back_to_an_old_template_takes_the_next_revision() {
    let d = deployment(2, "25%", "25%");
    let sets = [set("new", 1, 0, 0, &d), set("other", 2, 2, 2, &d)];
    let plan = step(&d, &sets);
    let patch = plan.patches.iter().find(|p| p.name == "web-new").unwrap();
    assert_eq!(patch.annotations[REVISION], "3");
    assert_eq!(patch.annotations["deployment.kubernetes.io/revision-history"], "1");
    assert_eq!(patch.resource_version.as_deref(), Some("7"));
    assert_eq!(plan.status.unwrap().metadata.annotations.unwrap()[REVISION], "3");
}

#[test]
fn scaling_during_a_rollout_is_shared_in_proportion() {
    let before = deployment(10, "2", "0");
    let sets = [set("old", 1, 8, 8, &before), set("new", 2, 4, 2, &before)];
    let plan = step(&deployment(20, "2", "0"), &sets);
    // 12 → 22 pods: 8·22/12 ≈ 15, and what is left goes to the larger set.
    let mut written = sizes(&plan);
    written.sort();
    assert_eq!(written, [("web-new".to_owned(), 7), ("web-old".to_owned(), 15)]);
    assert_eq!(plan.patches[0].annotations[DESIRED], "20");
}

#[test]
fn scaling_a_settled_deployment_scales_its_replica_set() {
    let sets = [set("new", 1, 1, 1, &deployment(1, "25%", "25%"))];
    let plan = step(&deployment(50, "25%", "25%"), &sets);
    assert_eq!(sizes(&plan), [("web-new".to_owned(), 50)]);
    assert_eq!(plan.events, ["Scaled up replica set web-new from 1 to 50"]);
}

#[test]
fn a_paused_deployment_scales_but_does_not_roll() {
    let mut d = deployment(3, "1", "0");
    d.spec.as_mut().unwrap().paused = Some(true);
    let sets = [set("old", 1, 2, 2, &deployment(2, "1", "0"))];
    let plan = step(&d, &sets);
    assert!(plan.create.is_none());
    assert_eq!(sizes(&plan), [("web-old".to_owned(), 3)]);
    assert_eq!(progressing(&plan).1, "DeploymentPaused");
}

#[test]
fn recreate_waits_for_the_last_old_pod() {
    let mut d = deployment(2, "0", "1");
    d.spec.as_mut().unwrap().strategy =
        Some(DeploymentStrategy { type_: Some("Recreate".into()), rolling_update: None });
    let down = step(&d, &[set("old", 1, 2, 2, &d)]);
    assert_eq!(sizes(&down), [("web-old".to_owned(), 0)]);
    assert!(down.create.is_none());
    let mut empty = set("old", 1, 0, 0, &d);
    assert!(step_with_pods(&d, &[empty.clone()], true).create.is_none());
    let up = step_with_pods(&d, &[empty.clone()], false);
    assert_eq!(up.create.as_ref().map(math::replicas), Some(2));
    Arc::make_mut(&mut empty).status.as_mut().unwrap().replicas = 1;
    assert!(step(&d, &[empty]).create.is_none());
}

#[test]
fn history_beyond_the_limit_is_deleted_oldest_first() {
    let mut d = deployment(1, "1", "0");
    d.spec.as_mut().unwrap().revision_history_limit = Some(1);
    let sets = [set("a", 1, 0, 0, &d), set("b", 2, 0, 0, &d), set("new", 3, 1, 1, &d)];
    d.status = step(&d, &sets).status.unwrap().status;
    let plan = step(&d, &sets);
    let gone: Vec<_> = plan.delete.iter().map(|rs| rs.metadata.name.clone().unwrap()).collect();
    assert_eq!(gone, ["web-a"]);
}

#[test]
fn availability_shows_in_the_status() {
    let d = deployment(4, "1", "1");
    let rows = [(4, "True", "MinimumReplicasAvailable"), (3, "True", "MinimumReplicasAvailable")];
    for (available, expected, reason) in rows.into_iter().chain([(2, "False", "MinimumReplicasUnavailable")])
    {
        let plan = step(&d, &[set("new", 1, 4, available, &d)]);
        let status = plan.status.unwrap().status.unwrap();
        let c = status::condition(&status, "Available").unwrap();
        assert_eq!((c.status.as_str(), c.reason.as_deref()), (expected, Some(reason)), "{available}");
        assert_eq!(status.unavailable_replicas, Some(4 - available));
    }
}
