//! Security contexts of pod and container → what the runtime is told. Pure.

use std::collections::BTreeMap;

use k8s_openapi::api::core::v1::{Container, Pod};
use weft_agent_runtime::Security;

use crate::pod::{self, PodId};

/// A security context that can't be honoured (upstream's `CreateContainerConfigError`).
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum Error {
    #[error("container has runAsNonRoot and image will run as root (pod: \"{pod}\", container: {container})")]
    ImageRunsAsRoot { pod: String, container: String },
    #[error("container's runAsUser breaks non-root policy (pod: \"{pod}\", container: {container})")]
    UserIsRoot { pod: String, container: String },
    #[error(
        "container has runAsNonRoot and image has non-numeric user ({user}), cannot verify user is non-root \
         (pod: \"{pod}\", container: {container})"
    )]
    UserIsName { user: String, pod: String, container: String },
    #[error("invalid id {0}")]
    Id(i64),
}

fn id(value: Option<i64>) -> Result<Option<u32>, Error> {
    value.map(|v| u32::try_from(v).map_err(|_overflow| Error::Id(v))).transpose()
}

/// The container's context over the pod's. `image_user` is the user of the image's configuration.
pub(crate) fn make(pod: &Pod, container: &Container, image_user: &str) -> Result<Security, Error> {
    let of_pod = pod::spec(pod).security_context.clone().unwrap_or_default();
    let own = container.security_context.clone().unwrap_or_default();
    let privileged = own.privileged.unwrap_or(false);
    let capabilities = own.capabilities.unwrap_or_default();
    let non_root = own.run_as_non_root.or(of_pod.run_as_non_root).unwrap_or(false);
    let run_as_user = id(own.run_as_user.or(of_pod.run_as_user))?;
    if non_root {
        verify_non_root(run_as_user, image_user, &PodId::of(pod).to_string(), &container.name)?;
    }
    let mut groups = Vec::new();
    for group in of_pod.supplemental_groups.into_iter().flatten().chain(of_pod.fs_group) {
        groups.extend(id(Some(group))?);
    }
    let seccomp = own.seccomp_profile.or(of_pod.seccomp_profile);
    Ok(Security {
        run_as_user,
        run_as_group: id(own.run_as_group.or(of_pod.run_as_group))?,
        supplemental_groups: groups,
        run_as_non_root: non_root,
        privileged,
        add_capabilities: capabilities.add.unwrap_or_default(),
        drop_capabilities: capabilities.drop.unwrap_or_default(),
        read_only_root: own.read_only_root_filesystem.unwrap_or(false),
        no_new_privileges: own.allow_privilege_escalation == Some(false) && !privileged,
        seccomp_default: seccomp.is_some_and(|p| p.type_ == "RuntimeDefault") && !privileged,
    })
}

fn verify_non_root(user: Option<u32>, image_user: &str, pod: &str, container: &str) -> Result<(), Error> {
    let (pod, container) = (pod.to_owned(), container.to_owned());
    match user {
        Some(0) => Err(Error::UserIsRoot { pod, container }),
        Some(_) => Ok(()),
        None => {
            let name = image_user.split(':').next().unwrap_or_default();
            match name.parse::<u32>() {
                Ok(0) => Err(Error::ImageRunsAsRoot { pod, container }),
                Ok(_) => Ok(()),
                Err(_) if name.is_empty() => Err(Error::ImageRunsAsRoot { pod, container }),
                Err(_) => Err(Error::UserIsName { user: name.to_owned(), pod, container }),
            }
        }
    }
}

/// The pod's sysctls.
pub(crate) fn sysctls(pod: &Pod) -> BTreeMap<String, String> {
    let context = pod::spec(pod).security_context.as_ref();
    let list = context.and_then(|c| c.sysctls.as_deref()).unwrap_or_default();
    list.iter().map(|s| (s.name.clone(), s.value.clone())).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn made(
        pod_context: serde_json::Value,
        own: serde_json::Value,
        image_user: &str,
    ) -> Result<Security, Error> {
        let pod: Pod =
            serde_json::from_value(json!({"metadata": {"name": "p", "namespace": "n", "uid": "u"},
            "spec": {"securityContext": pod_context, "containers": [{"name": "c", "securityContext": own}]}}))
            .unwrap();
        make(&pod, &pod::containers(&pod)[0], image_user)
    }

    #[test]
    fn the_containers_context_wins() {
        let s = made(
            json!({"runAsUser": 5, "runAsGroup": 6, "fsGroup": 7, "supplementalGroups": [8]}),
            json!({"runAsUser": 9, "allowPrivilegeEscalation": false, "capabilities": {"drop": ["ALL"]}}),
            "",
        )
        .unwrap();
        assert_eq!((s.run_as_user, s.run_as_group, s.supplemental_groups), (Some(9), Some(6), vec![8, 7]));
        assert!(s.no_new_privileges && s.drop_capabilities == ["ALL"]);
    }

    #[test]
    fn non_root_is_verified_with_upstreams_words() {
        let fail =
            |own, image: &str| made(json!({"runAsNonRoot": true}), own, image).unwrap_err().to_string();
        assert_eq!(
            fail(json!({}), ""),
            "container has runAsNonRoot and image will run as root (pod: \"p_n(u)\", container: c)"
        );
        assert!(fail(json!({"runAsUser": 0}), "").contains("breaks non-root policy"));
        assert!(fail(json!({}), "nginx").contains("non-numeric user (nginx)"));
        assert!(made(json!({"runAsNonRoot": true}), json!({}), "101:101").is_ok());
    }
}
