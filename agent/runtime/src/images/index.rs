//! The index of an image store: which images are there, under which names, of which layers.

use std::collections::{BTreeMap, BTreeSet};

use serde::{Deserialize, Serialize};

use super::archive::Found;
use super::reference::{self, Reference};
use super::{Config, ImageError};
use crate::Image;

#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub(super) struct Index {
    pub(super) images: BTreeMap<String, Record>,
    /// Bytes by hexadecimal diff id.
    pub(super) layers: BTreeMap<String, u64>,
}

#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub(super) struct Record {
    pub(super) tags: BTreeSet<String>,
    /// `name@digest of a manifest`.
    pub(super) digests: BTreeSet<String>,
    pub(super) config: Config,
}

impl Index {
    pub(super) fn image(&self, id: &str) -> Option<Image> {
        let record = self.images.get(id)?;
        let hexes = record.config.rootfs.diff_ids.iter().filter_map(|id| reference::digest_hex(id));
        Some(Image {
            id: id.to_owned(),
            tags: record.tags.iter().cloned().collect(),
            size_bytes: hexes.filter_map(|hex| self.layers.get(hex)).sum(),
            user: record.config.config.as_ref().and_then(|config| config.user.clone()).unwrap_or_default(),
        })
    }

    pub(super) fn find(&self, text: &str) -> Result<Option<&str>, ImageError> {
        let id =
            if reference::digest_hex(text).is_some() { text.to_owned() } else { format!("sha256:{text}") };
        if let Some((id, _)) = self.images.get_key_value(&id) {
            return Ok(Some(id));
        }
        if reference::digest_hex(text).is_some() {
            return Ok(None);
        }
        let wanted = Reference::parse(text).ok_or_else(|| ImageError::Reference(text.to_owned()))?;
        let matches = |record: &Record| match &wanted.digest {
            Some(digest) => record.digests.contains(&format!("{}@{digest}", wanted.name)),
            None => record.tags.contains(&wanted.to_string()),
        };
        Ok(self.images.iter().find(|(_, record)| matches(record)).map(|(id, _)| id.as_str()))
    }

    /// Takes one of several references off an image; false if the image itself is to go.
    pub(super) fn untag(&mut self, id: &str, reference: &str) -> bool {
        let by_id = reference == id || id.strip_prefix("sha256:") == Some(reference);
        let (Some(record), Some(wanted)) = (self.images.get_mut(id), Reference::parse(reference)) else {
            return false;
        };
        !by_id && wanted.digest.is_none() && record.tags.len() > 1 && record.tags.remove(&wanted.to_string())
    }

    pub(super) fn drop_unused_layers(&mut self) -> Vec<String> {
        let used: BTreeSet<&str> = self
            .images
            .values()
            .flat_map(|record| {
                record.config.rootfs.diff_ids.iter().filter_map(|id| reference::digest_hex(id))
            })
            .collect();
        let unused: Vec<String> =
            self.layers.keys().filter(|hex| !used.contains(hex.as_str())).cloned().collect();
        self.layers.retain(|hex, _| !unused.contains(hex));
        unused
    }
}

/// Names of an image that is being imported.
pub(super) struct Names {
    pub(super) tags: BTreeSet<String>,
    pub(super) digests: BTreeSet<String>,
}

pub(super) fn names_of(found: &Found) -> Result<Names, ImageError> {
    let mut names = Names { tags: BTreeSet::new(), digests: BTreeSet::new() };
    for name in &found.names {
        let reference = Reference::parse(name).ok_or_else(|| ImageError::Reference(name.clone()))?;
        names.digests.extend(found.manifest.iter().map(|digest| format!("{}@{digest}", reference.name)));
        if reference.tag.is_some() {
            names.tags.insert(Reference { digest: None, ..reference }.to_string());
        }
    }
    Ok(names)
}
