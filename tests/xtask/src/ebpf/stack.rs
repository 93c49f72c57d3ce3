//! How much stack a program takes with all that it calls, as the oldest verifier that weft is for counts it: Linux 6.1 rounds each
//! frame up to 32 bytes, where newer ones round to 16 or less. What is too deep there loads without a word on a newer machine.

use std::collections::{BTreeMap, HashMap};

use anyhow::{Context as _, ensure};
use object::{
    Object as _, ObjectSection as _, ObjectSymbol as _, RelocationTarget, SectionIndex, SymbolKind,
};

/// Bytes that a chain of calls may take.
const MOST: u32 = 512;
/// What a frame is rounded up to.
const FRAME: u32 = 32;
/// The section of functions that are only called.
const CALLED: &str = ".text";

/// `BPF_CALL` of another function of the object; the source register says which kind of call it is.
const CALL: u8 = 0x85;
const OF_FUNCTION: u8 = 1;
/// `BPF_ALU64 | BPF_MOV | BPF_X`, `BPF_ALU64 | BPF_ADD | BPF_K`, and the instruction of two words.
const COPY: u8 = 0xbf;
const ADD: u8 = 0x07;
const WIDE: u8 = 0x18;
/// Classes of instructions: loads and stores by register, and stores of a number.
const LOAD: u8 = 1;
const STORES: [u8; 2] = [2, 3];
/// The register that points to the frame's end.
const FRAME_POINTER: u8 = 10;

/// Where a function begins.
type Place = (SectionIndex, u64);

struct Function {
    name: String,
    depth: u32,
    calls: Vec<Place>,
}

/// Checks every program of an object.
///
/// # Errors
/// If one is too deep, with its chain, or if the object can't be read.
pub(super) fn check(object: &[u8]) -> anyhow::Result<()> {
    let file = object::File::parse(object).context("the eBPF object can't be read")?;
    let functions = functions(&file)?;
    for (place, function) in &functions {
        let section = file.section_by_index(place.0)?;
        if section.name()? == CALLED {
            continue;
        }
        let (deepest, chain) = deepest(&functions, place);
        ensure!(
            deepest <= MOST,
            "{} takes {deepest} bytes of stack, and Linux 6.1 has {MOST}: {}",
            function.name,
            chain.join(" > ")
        );
    }
    Ok(())
}

fn functions(file: &object::File<'_>) -> anyhow::Result<HashMap<Place, Function>> {
    let mut found = HashMap::new();
    for symbol in file.symbols().filter(|symbol| symbol.kind() == SymbolKind::Text && symbol.size() > 0) {
        let section = symbol.section_index().context("a function is in no section")?;
        let code = file.section_by_index(section)?.data()?;
        let range = usize::try_from(symbol.address())?..usize::try_from(symbol.address() + symbol.size())?;
        let code = code.get(range).context("a function is behind its section's end")?;
        let (depth, calls) = read(file, section, symbol.address(), code)?;
        found.insert((section, symbol.address()), Function { name: symbol.name()?.to_owned(), depth, calls });
    }
    Ok(found)
}

/// The depth of a function's own frame, and what it calls.
fn read(
    file: &object::File<'_>,
    section: SectionIndex,
    begin: u64,
    code: &[u8],
) -> anyhow::Result<(u32, Vec<Place>)> {
    let relocations: BTreeMap<u64, _> = file.section_by_index(section)?.relocations().collect();
    let (mut depth, mut calls, mut copies) = (0, Vec::new(), [false; 16]);
    let mut at = 0;
    while let Some(&[operation, registers, o0, o1, i0, i1, i2, i3]) = code.get(at..at + 8) {
        let (target, source) = (registers & 15, registers >> 4);
        let offset = i32::from(i16::from_le_bytes([o0, o1]));
        let number = i32::from_le_bytes([i0, i1, i2, i3]);
        let class = operation & 7;
        let is_copy = &mut copies[usize::from(target)];
        if (STORES.contains(&class) && target == FRAME_POINTER) || (class == LOAD && source == FRAME_POINTER)
        {
            depth = depth.max(below(offset));
        }
        // A pointer into the frame is made by a copy of its end, and an addition.
        if operation == COPY && source == FRAME_POINTER {
            *is_copy = true;
        } else if operation == ADD && *is_copy {
            depth = depth.max(below(number));
            *is_copy = false;
        } else if !STORES.contains(&class) {
            *is_copy = false;
        }
        let here = begin + at as u64;
        if operation == CALL && source == OF_FUNCTION {
            calls.push(match relocations.get(&here).map(object::Relocation::target) {
                Some(RelocationTarget::Symbol(index)) => {
                    let symbol = file.symbol_by_index(index)?;
                    let section = symbol.section_index().context("a call leads to no section")?;
                    let within = if symbol.kind() == SymbolKind::Section { words(number + 1) } else { 0 };
                    (section, symbol.address().wrapping_add_signed(within))
                }
                _ => (section, (here + 8).wrapping_add_signed(words(number))),
            });
        }
        at += if operation == WIDE { 16 } else { 8 };
    }
    Ok((depth, calls))
}

fn below(offset: i32) -> u32 {
    if offset < 0 { offset.unsigned_abs() } else { 0 }
}

/// Instructions in bytes.
fn words(count: i32) -> i64 {
    i64::from(count) * 8
}

/// Programs don't call themselves: the verifier refuses that.
fn deepest(functions: &HashMap<Place, Function>, place: &Place) -> (u32, Vec<String>) {
    let Some(function) = functions.get(place) else { return (0, Vec::new()) };
    let below = function.calls.iter().map(|called| deepest(functions, called));
    let (bytes, mut chain) = below.max_by_key(|(bytes, _)| *bytes).unwrap_or_default();
    chain.insert(0, format!("{} ({})", function.name, function.depth));
    (bytes + function.depth.max(1).next_multiple_of(FRAME), chain)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn function(depth: u32, calls: &[u64]) -> Function {
        let calls = calls.iter().map(|at| (SectionIndex(1), *at)).collect();
        Function { name: depth.to_string(), depth, calls }
    }

    #[test]
    fn frames_are_rounded_up_along_the_deepest_chain() {
        let all = [function(72, &[8, 16]), function(408, &[24]), function(96, &[]), function(0, &[])];
        let all =
            all.into_iter().enumerate().map(|(n, one)| ((SectionIndex(1), n as u64 * 8), one)).collect();
        let (bytes, chain) = deepest(&all, &(SectionIndex(1), 0));
        assert_eq!((bytes, chain.join(" > ").as_str()), (544, "72 (72) > 408 (408) > 0 (0)"));
    }
}
