//! Where functions are: `.eh_frame`, symbols, and what calls point at.

use gimli::{CieOrFde, EhFrame, LittleEndian, Pointer, UnwindSection};

use super::CodeError;
use super::image::Image;

/// Most functions that are looked at.
const MAX_EXTENTS: usize = 1 << 21;

/// A range of code that is decoded from its start.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Extent {
    pub(super) start: u64,
    pub(super) end: u64,
    /// Language-specific data area: the exception table of this range.
    pub(super) lsda: Option<u64>,
    /// Known to be a function or part of one, by unwind information or a
    /// symbol; the rest lies between functions.
    pub(super) function: bool,
    /// Only known to begin a function because something leads here.
    pub(super) guessed: bool,
}

/// Extents by start, ascending and disjoint, which together cover all code.
pub(super) fn extents(image: &Image) -> Result<Vec<Extent>, CodeError> {
    let mut found = from_unwind_information(image)?;
    found.retain(|e| {
        image
            .code_range(e.start)
            .is_some_and(|(_, end)| e.start < e.end && e.end <= end)
    });
    separate(&mut found);
    let mut symbols: Vec<Extent> = image
        .symbols
        .iter()
        .filter(|s| s.size > 0)
        .filter_map(|s| {
            let (_, limit) = image.code_range(s.at)?;
            Some(Extent {
                start: s.at,
                end: s.at.checked_add(s.size)?.min(limit),
                lsda: None,
                function: true,
                guessed: false,
            })
        })
        .filter(|s| {
            // Only where unwind information is silent.
            let next = found.partition_point(|e| e.end <= s.start);
            found.get(next).is_none_or(|e| e.start >= s.end)
        })
        .collect();
    separate(&mut symbols);
    found.append(&mut symbols);
    found.sort_by_key(|e| e.start);
    Ok(with_gaps(image, found))
}

/// Sorts, and cuts each extent where the next begins.
fn separate(extents: &mut Vec<Extent>) {
    extents.sort_by_key(|e| (e.start, std::cmp::Reverse(e.end)));
    extents.dedup_by_key(|e| e.start);
    for i in 1..extents.len() {
        let next = extents[i].start;
        let former = &mut extents[i - 1];
        former.end = former.end.min(next);
    }
}

fn with_gaps(image: &Image, functions: Vec<Extent>) -> Vec<Extent> {
    let mut all = Vec::with_capacity(functions.len() * 2);
    let mut functions = functions.into_iter().peekable();
    for &(start, end) in image.code() {
        let mut at = start;
        while let Some(next) = functions.next_if(|f| f.start < end) {
            if at < next.start {
                all.push(gap(at, next.start));
            }
            at = next.end;
            all.push(next);
        }
        if at < end {
            all.push(gap(at, end));
        }
    }
    all
}

fn gap(start: u64, end: u64) -> Extent {
    Extent {
        start,
        end,
        lsda: None,
        function: false,
        guessed: false,
    }
}

/// Cuts the ranges between functions where `starts` (ascending) says that a
/// function begins: code without unwind information in a stripped library.
pub(super) fn split_gaps(extents: Vec<Extent>, starts: &[u64]) -> Vec<Extent> {
    let mut all = Vec::with_capacity(extents.len());
    for extent in extents {
        if extent.function {
            all.push(extent);
            continue;
        }
        let from = starts.partition_point(|&s| s < extent.start);
        let to = starts.partition_point(|&s| s < extent.end);
        let mut at = extent.start;
        let mut function = false;
        for &start in &starts[from..to] {
            if at < start {
                all.push(Extent {
                    function,
                    guessed: function,
                    ..gap(at, start)
                });
            }
            at = start;
            function = true;
        }
        all.push(Extent {
            function,
            guessed: function,
            ..gap(at, extent.end)
        });
    }
    all
}

/// The extent that holds `at`.
pub(super) fn index_of(extents: &[Extent], at: u64) -> Option<usize> {
    let index = extents.partition_point(|e| e.start <= at).checked_sub(1)?;
    (at < extents[index].end).then_some(index)
}

fn from_unwind_information(image: &Image) -> Result<Vec<Extent>, CodeError> {
    let Some((start, end)) = image.eh_frame() else {
        return Ok(Vec::new());
    };
    let malformed = CodeError::Malformed { what: ".eh_frame" };
    let Some(bytes) = image.bytes(start, end) else {
        return Ok(Vec::new());
    };
    let frames = EhFrame::new(bytes, LittleEndian);
    let bases = gimli::BaseAddresses::default().set_eh_frame(start);
    let mut entries = frames.entries(&bases);
    let mut found = Vec::new();
    while let Some(entry) = entries.next().map_err(|_| malformed.clone())? {
        let CieOrFde::Fde(partial) = entry else {
            continue;
        };
        let frame = partial
            .parse(UnwindSection::cie_from_offset)
            .map_err(|_| malformed.clone())?;
        let lsda = match frame.lsda() {
            Some(Pointer::Direct(at)) if at != 0 => Some(at),
            Some(Pointer::Indirect(at)) => image.u64_at(at),
            _ => None,
        };
        if found.len() == MAX_EXTENTS {
            return Err(CodeError::TooLarge {
                what: "unwind entries",
                size: found.len() as u64,
                limit: MAX_EXTENTS as u64,
            });
        }
        let start = frame.initial_address();
        found.push(Extent {
            start,
            end: start.saturating_add(frame.len()),
            lsda,
            function: true,
            guessed: false,
        });
    }
    Ok(found)
}
