//! The files of a configMap, secret, downwardAPI or projected volume, made from the API's objects.

use std::sync::Arc;

use jiff::Timestamp;
use k8s_openapi::api::core::v1::{
    DownwardAPIVolumeFile, KeyToPath, Pod, ServiceAccountTokenProjection, Volume,
};

use super::atomic::{File, Files};
use crate::env::{self, Facts};
use crate::objects::{Data, Kind, ReadError};
use crate::pod::{self, PodId};
use crate::shared::Shared;

/// A volume's content could not be had.
#[derive(Debug, thiserror::Error)]
pub(super) enum Error {
    #[error("{0}")]
    Object(#[from] ReadError),
    #[error("{kind} references non-existent {key_kind} key: {key}", kind = kind.lower(), key_kind = key_kind(*kind))]
    NoKey { kind: Kind, key: String },
    #[error("{0}")]
    Field(#[from] env::Error),
    #[error("failed to fetch token: {0}")]
    Token(String),
}

fn key_kind(kind: Kind) -> &'static str {
    match kind {
        Kind::ConfigMap => "config",
        Kind::Secret => "secret",
    }
}

/// Files, and when some of them go stale by themselves.
#[derive(Debug, Default)]
pub(super) struct Payload {
    pub(super) files: Files,
    pub(super) renew_at: Option<Timestamp>,
}

const DEFAULT_MODE: u32 = 0o644;

fn mode(own: Option<i32>, default: Option<i32>) -> u32 {
    own.or(default).and_then(|m| u32::try_from(m).ok()).unwrap_or(DEFAULT_MODE)
}

/// What an object part of a volume says.
struct Part<'a> {
    kind: Kind,
    name: &'a str,
    items: Option<&'a [KeyToPath]>,
    optional: bool,
    default_mode: Option<i32>,
}

/// The content of `volume` now.
pub(super) async fn make(
    shared: &Shared,
    pod: &Pod,
    volume: &Volume,
    facts: &Facts,
) -> Result<Payload, Error> {
    let mut payload = Payload::default();
    if let Some(source) = &volume.config_map {
        let part = Part {
            kind: Kind::ConfigMap,
            name: &source.name,
            items: source.items.as_deref(),
            optional: source.optional.unwrap_or(false),
            default_mode: source.default_mode,
        };
        object(shared, pod, &part, &mut payload.files).await?;
    } else if let Some(source) = &volume.secret {
        let part = Part {
            kind: Kind::Secret,
            name: source.secret_name.as_deref().unwrap_or_default(),
            items: source.items.as_deref(),
            optional: source.optional.unwrap_or(false),
            default_mode: source.default_mode,
        };
        object(shared, pod, &part, &mut payload.files).await?;
    } else if let Some(source) = &volume.downward_api {
        let items = source.items.as_deref().unwrap_or_default();
        downward(pod, items, (source.default_mode, facts), &mut payload.files)?;
    } else if volume.projected.is_some() {
        projected(shared, pod, volume, facts, &mut payload).await?;
    }
    Ok(payload)
}

async fn projected(
    shared: &Shared,
    pod: &Pod,
    volume: &Volume,
    facts: &Facts,
    payload: &mut Payload,
) -> Result<(), Error> {
    let Some(projected) = &volume.projected else { return Ok(()) };
    let default_mode = projected.default_mode;
    for source in projected.sources.iter().flatten() {
        if let Some(source) = &source.config_map {
            let part = Part {
                kind: Kind::ConfigMap,
                name: &source.name,
                items: source.items.as_deref(),
                optional: source.optional.unwrap_or(false),
                default_mode,
            };
            object(shared, pod, &part, &mut payload.files).await?;
        }
        if let Some(source) = &source.secret {
            let part = Part {
                kind: Kind::Secret,
                name: &source.name,
                items: source.items.as_deref(),
                optional: source.optional.unwrap_or(false),
                default_mode,
            };
            object(shared, pod, &part, &mut payload.files).await?;
        }
        if let Some(source) = &source.downward_api {
            downward(
                pod,
                source.items.as_deref().unwrap_or_default(),
                (default_mode, facts),
                &mut payload.files,
            )?;
        }
        if let Some(projection) = &source.service_account_token {
            token(shared, pod, projection, (default_mode, payload)).await?;
        }
    }
    Ok(())
}

async fn object(shared: &Shared, pod: &Pod, part: &Part<'_>, files: &mut Files) -> Result<(), Error> {
    let namespace = PodId::of(pod).namespace;
    let data = match shared.objects.hold(part.kind, &namespace, part.name).read().await {
        Err(ReadError::NotFound { .. }) if part.optional => Arc::new(Data::new()),
        other => other?,
    };
    select(&data, part, files)
}

fn select(data: &Data, part: &Part<'_>, files: &mut Files) -> Result<(), Error> {
    let file = |data: &[u8], own: Option<i32>| File {
        data: data.to_vec(),
        mode: mode(own, part.default_mode),
        owner: None,
    };
    let Some(items) = part.items.filter(|items| !items.is_empty()) else {
        files.extend(data.iter().map(|(key, value)| (key.clone(), file(value, None))));
        return Ok(());
    };
    for item in items {
        match data.get(&item.key) {
            Some(value) => {
                files.insert(item.path.clone(), file(value, item.mode));
            }
            None if part.optional => {}
            None => return Err(Error::NoKey { kind: part.kind, key: item.key.clone() }),
        }
    }
    Ok(())
}

fn downward(
    pod: &Pod,
    items: &[DownwardAPIVolumeFile],
    (default_mode, facts): (Option<i32>, &Facts),
    files: &mut Files,
) -> Result<(), Error> {
    for item in items {
        let text = if let Some(field) = &item.field_ref {
            env::field(pod, &field.field_path, facts)?
        } else if let Some(resource) = &item.resource_field_ref {
            let name = resource.container_name.clone().unwrap_or_default();
            let (container, _) = pod::find_container(pod, &name).ok_or(env::Error::NoContainer(name))?;
            env::resource(pod, container, resource, facts)?
        } else {
            continue;
        };
        let file = File { data: text.into_bytes(), mode: mode(item.mode, default_mode), owner: None };
        files.insert(item.path.clone(), file);
    }
    Ok(())
}

/// The one user that all containers run as, if the pod says so.
fn only_user(pod: &Pod) -> Option<u32> {
    let of_pod = pod::spec(pod).security_context.as_ref().and_then(|c| c.run_as_user);
    let mut users = pod::all_containers(pod)
        .map(|(c, _)| c.security_context.as_ref().and_then(|s| s.run_as_user).or(of_pod))
        .collect::<std::collections::BTreeSet<_>>();
    let only = users.pop_first()??;
    users.is_empty().then(|| u32::try_from(only).ok()).flatten()
}

async fn token(
    shared: &Shared,
    pod: &Pod,
    projection: &ServiceAccountTokenProjection,
    (default_mode, payload): (Option<i32>, &mut Payload),
) -> Result<(), Error> {
    let token = shared
        .tokens
        .get(&shared.client, pod, projection)
        .await
        .map_err(|e| Error::Token(crate::start::api_error(&e)))?;
    let owner = only_user(pod);
    // A token is for its user (and the fsGroup) alone where there is a single one.
    let mode = if owner.is_some() || super::ownership::fs_group(pod).is_some() {
        0o600
    } else {
        mode(None, default_mode)
    };
    let file = File { data: token.text.into_bytes(), mode, owner };
    payload.files.insert(projection.path.clone(), file);
    payload.renew_at = Some(payload.renew_at.map_or(token.renew_at, |at| at.min(token.renew_at)));
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn items_choose_keys_paths_and_modes() {
        let data: Data = [("a".to_owned(), b"1".to_vec()), ("b".to_owned(), b"2".to_vec())].into();
        let item = |key: &str, mode| KeyToPath { key: key.into(), path: format!("x/{key}"), mode };
        let part = |items, optional| Part {
            kind: Kind::ConfigMap,
            name: "c",
            items,
            optional,
            default_mode: Some(0o400),
        };
        let mut files = Files::new();
        let chosen = [item("a", Some(0o755))];
        select(&data, &part(Some(&chosen), false), &mut files).unwrap();
        assert_eq!((files.len(), files["x/a"].mode), (1, 0o755));
        select(&data, &part(None, false), &mut files).unwrap();
        assert_eq!(files["b"].mode, 0o400);
        let missing = [item("z", None)];
        let error = select(&data, &part(Some(&missing), false), &mut files).unwrap_err();
        assert_eq!(error.to_string(), "configmap references non-existent config key: z");
        select(&data, &part(Some(&missing), true), &mut files).unwrap();
    }
}
