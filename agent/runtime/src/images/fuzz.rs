//! What the fuzzer feeds: archives of images, and layers.

use std::io::{self, Read as _};
use std::path::Path;

use super::archive::Archive;
use super::{index, layer};

/// As much of a layer as is read: decompressed, a few bytes can be any number.
const MAX_LAYER_BYTES: u64 = 1 << 20;

/// Reads an archive as an import does, without keeping anything; the number of images in it, if it is one.
pub fn archive(path: &Path, scratch: &Path) -> Option<usize> {
    let archive = Archive::open(path, scratch).ok()?;
    let images = archive.images().ok()?;
    for image in &images {
        let _unnamed = index::names_of(image);
        for blob in &image.layers {
            if let Ok(layer) = archive.layer(blob) {
                let _broken = io::copy(&mut layer.take(MAX_LAYER_BYTES), &mut io::sink());
            }
        }
    }
    Some(images.len())
}

/// Unpacks a layer; whether it could be.
pub fn layer(layer: &[u8], folder: &Path) -> bool {
    layer::unpack(layer, folder).is_ok()
}
