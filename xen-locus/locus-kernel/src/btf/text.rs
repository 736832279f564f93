//! Types as C text, with offset and size in bytes beside every member.
//!
//! A guest chooses how many types have one name, how many members each has, and how long the text of each member is. So the
//! text is paid for from the guest's budget.

use locus_guest::budget::Budget;

use super::member::{enumerator, member, Member};
use super::{Btf, Error, Steps, TypeKind, TypeRecord, CHAIN};

/// Deepest nesting of structures and of prototypes written out.
const DEPTH: usize = 12;
/// Most members, parameters and enumerators written for one type.
const STEPS: u32 = 1 << 16;
/// Longest text of one member, in bytes.
const LINE_MAX: usize = 4096;
/// Most types of one name that are shown.
const NAMESAKES: usize = 64;
/// Column of the offsets.
const COLUMN: usize = 48;
/// Units of the guest's budget for one step. A byte of text costs one more: it is copied a few times.
const STEP_UNITS: u64 = 16;

/// A type in a form to show. Names are without control characters.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Described {
    /// `struct`, `union`, `enum`, `typedef`, `function`, `variable`, `type`.
    pub kind: &'static str,
    /// Its name; empty if it has none.
    pub name: String,
    /// Its id in the BTF.
    pub id: u32,
    /// Its size in bytes; functions have none.
    pub size: Option<u64>,
    /// Its declaration as C, of one or several lines.
    pub text: String,
    /// Members of a structure or union, with those of its anonymous members.
    pub members: Vec<DescribedMember>,
}

/// A member in a form to show.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DescribedMember {
    /// Its name; empty for an unnamed bit field.
    pub name: String,
    /// Its declaration as C.
    pub declaration: String,
    /// Offset from the start of the outermost structure, in bytes.
    pub offset: u64,
    /// Size in bytes. For a bit field it is the size of its declared type.
    pub size: u64,
    /// For a bit field: number of its first bit, counted from `offset`, and its width in bits.
    pub bits: Option<(u64, u32)>,
}

/// The text of a type being written.
struct Writer<'a> {
    btf: &'a Btf,
    steps: Steps,
    budget: &'a Budget,
    out: String,
    parts: Vec<DescribedMember>,
}

/// A declaration taken apart: `const struct foo *name[4]`.
struct Declared {
    /// Qualifiers in front.
    front: String,
    /// Id of the type all the rest is built on.
    base: u32,
    /// Tags such as `__user`, then stars, name, brackets.
    rest: String,
}

impl Btf {
    /// All types that `wanted` names: `struct foo`, `union foo`, `enum foo`, or a bare name, which
    /// also finds typedefs, functions, variables and basic types. At most 64; none if there is no
    /// such type. `budget` is that of the guest.
    ///
    /// # Errors
    /// [`Error::Memory`]: the budget is spent.
    pub fn describe(&self, wanted: &str, budget: &Budget) -> Result<Vec<Described>, Error> {
        use TypeKind::*;
        let (kinds, name): (&[TypeKind], &str) = match wanted.trim().split_once(' ') {
            Some(("struct", name)) => (&[Struct], name),
            Some(("union", name)) => (&[Union], name),
            Some(("enum", name)) => (&[Enum, Enum64], name),
            _ => (
                &[Struct, Union, Enum, Enum64, Typedef, Func, Var, Int, Float],
                wanted.trim(),
            ),
        };
        self.named(name.trim())
            .filter_map(|id| Some((id, self.record(id)?)))
            .filter(|(_, r)| kinds.contains(&r.kind))
            .take(NAMESAKES)
            .map(|(id, r)| self.describe_one(id, &r, budget))
            .collect()
    }

    fn describe_one(
        &self,
        id: u32,
        r: &TypeRecord<'_>,
        budget: &Budget,
    ) -> Result<Described, Error> {
        let mut w = Writer {
            btf: self,
            steps: Steps::new(STEPS),
            budget,
            out: String::new(),
            parts: Vec::new(),
        };
        let name = self.name(r.name);
        let (kind, done) = match r.kind {
            TypeKind::Struct => ("struct", w.block(id, r, 0, 0)),
            TypeKind::Union => ("union", w.block(id, r, 0, 0)),
            TypeKind::Enum | TypeKind::Enum64 => ("enum", w.block(id, r, 0, 0)),
            TypeKind::Typedef => {
                w.out.push_str("typedef ");
                ("typedef", w.declare(r.value, &name, 0, 0))
            }
            TypeKind::Func => ("function", w.declare(r.value, &name, 0, 0)),
            TypeKind::Var => ("variable", w.declare(r.value, &name, 0, 0)),
            _ => {
                w.out.push_str(&name);
                ("type", Some(()))
            }
        };
        w.pay(w.out.len());
        // What is cut short for want of budget is not shown as if it were the type.
        budget.check()?;
        w.out.push(';');
        if done.is_none() {
            w.out
                .push_str(" /* the rest is not shown: too long or too deep */");
        }
        let size = match r.kind {
            TypeKind::Func => None,
            _ => self.bytes_of(id),
        };
        if let Some(size) = size {
            w.out.push_str(&format!(" /* size: {size} */"));
        }
        w.out.push('\n');
        Ok(Described {
            kind,
            name,
            id,
            size,
            text: w.out,
            members: w.parts,
        })
    }

    /// Takes apart the declaration of `name` with type `id`.
    fn declared(&self, mut id: u32, name: &str, depth: usize, steps: &Steps) -> Option<Declared> {
        let mut rest = name.to_owned();
        let (mut front, mut tags) = (String::new(), String::new());
        for _ in 0..CHAIN {
            steps.take()?;
            if rest.len() > LINE_MAX {
                return None;
            }
            let Some(r) = self.record(id) else { break };
            match r.kind {
                TypeKind::Ptr => {
                    let inner = self.behind_tags(r.value);
                    let brackets = self
                        .record(inner)
                        .is_some_and(|r| matches!(r.kind, TypeKind::Array | TypeKind::FuncProto));
                    rest = if brackets {
                        format!("(*{rest})")
                    } else {
                        format!("*{rest}")
                    };
                    id = r.value;
                }
                TypeKind::Array => {
                    rest.push_str(&format!("[{}]", r.word(2)?));
                    id = r.word(0)?;
                }
                TypeKind::FuncProto => {
                    rest.push_str(&self.parameters(&r, depth, steps)?);
                    id = r.value;
                }
                TypeKind::Const | TypeKind::Volatile | TypeKind::Restrict => {
                    let word = match r.kind {
                        TypeKind::Const => "const",
                        TypeKind::Volatile => "volatile",
                        _ => "restrict",
                    };
                    let pointer = self
                        .record(self.behind_tags(r.value))
                        .is_some_and(|r| r.kind == TypeKind::Ptr);
                    if pointer {
                        let space = if rest.is_empty() { "" } else { " " };
                        rest = format!("{word}{space}{rest}");
                    } else {
                        front.push_str(word);
                        front.push(' ');
                    }
                    id = r.value;
                }
                TypeKind::TypeTag => {
                    tags.push_str(&format!("__{} ", self.name(r.name)));
                    id = r.value;
                }
                _ => break,
            }
        }
        Some(Declared {
            front,
            base: id,
            rest: tags + &rest,
        })
    }

    /// Looks through tags and qualifiers, not through typedefs.
    fn behind_tags(&self, mut id: u32) -> u32 {
        for _ in 0..CHAIN {
            match self.record(id) {
                Some(r) if r.kind.transparent() && r.kind != TypeKind::Typedef => id = r.value,
                _ => break,
            }
        }
        id
    }

    fn parameters(&self, r: &TypeRecord<'_>, depth: usize, steps: &Steps) -> Option<String> {
        if depth >= DEPTH {
            return None;
        }
        let mut all = Vec::new();
        for i in 0..r.parts {
            steps.take()?;
            let (name, id) = (r.word(2 * i)?, r.word(2 * i + 1)?);
            all.push(if id == 0 && name == 0 {
                "...".to_owned()
            } else {
                self.line(id, &self.name(name), depth + 1, steps)?
            });
            if all.iter().map(String::len).sum::<usize>() > LINE_MAX {
                return None;
            }
        }
        if all.is_empty() {
            all.push("void".into());
        }
        Some(format!("({})", all.join(", ")))
    }

    /// A declaration in one line; what has no name is not written out.
    fn line(&self, id: u32, name: &str, depth: usize, steps: &Steps) -> Option<String> {
        let d = self.declared(id, name, depth, steps)?;
        let word = match self.record(d.base) {
            None => "void".to_owned(),
            Some(r) => {
                let word = keyword(&r);
                let name = self.name(r.name);
                match (word.is_empty(), name.is_empty()) {
                    (true, _) => name,
                    (false, true) => format!("{word} {{...}}"),
                    (false, false) => format!("{word} {name}"),
                }
            }
        };
        let space = if d.rest.is_empty() { "" } else { " " };
        Some(format!("{}{word}{space}{}", d.front, d.rest))
    }
}

fn keyword(r: &TypeRecord<'_>) -> &'static str {
    match r.kind {
        TypeKind::Struct => "struct",
        TypeKind::Union => "union",
        TypeKind::Enum | TypeKind::Enum64 => "enum",
        TypeKind::Fwd if r.flag => "union",
        TypeKind::Fwd => "struct",
        _ => "",
    }
}

impl Writer<'_> {
    /// Takes the units for a step in which `bytes` of text were written; `None` when they are spent.
    fn pay(&self, bytes: usize) -> Option<()> {
        self.budget.spend(STEP_UNITS + bytes as u64).ok()
    }

    /// Writes the declaration of `name`; an anonymous structure or enum is written out.
    fn declare(&mut self, id: u32, name: &str, start: u64, depth: usize) -> Option<()> {
        let d = self.btf.declared(id, name, depth, &self.steps)?;
        match self.btf.record(d.base) {
            Some(r) if r.name == 0 && open(r.kind) => {
                self.out.push_str(&d.front);
                self.block(d.base, &r, start, depth)?;
                if !d.rest.is_empty() {
                    self.out.push(' ');
                    self.out.push_str(&d.rest);
                }
            }
            _ => {
                let line = self.btf.line(id, name, depth, &self.steps)?;
                self.out.push_str(&line);
            }
        }
        Some(())
    }

    /// Writes `struct name { … }`; `start` is where it begins in the outermost structure, in bits.
    fn block(&mut self, id: u32, r: &TypeRecord<'_>, start: u64, depth: usize) -> Option<()> {
        if depth >= DEPTH {
            return None;
        }
        self.out.push_str(keyword(r));
        if r.name != 0 {
            self.out.push(' ');
            self.out.push_str(&self.btf.name(r.name));
        }
        self.out.push_str(" {\n");
        let indent = "\t".repeat(depth + 1);
        if matches!(r.kind, TypeKind::Enum | TypeKind::Enum64) {
            for i in 0..r.parts {
                self.steps.take()?;
                let (name, value) = enumerator(r, i)?;
                let name = self.btf.name(name);
                self.pay(name.len())?;
                self.out.push_str(&format!("{indent}{name} = {value},\n"));
            }
        } else {
            let mut end = 0;
            for i in 0..r.parts {
                self.steps.take()?;
                let m = member(r, i)?;
                let hole = m.bit.saturating_sub(end) / 8;
                if r.kind == TypeKind::Struct && hole > 0 {
                    self.out
                        .push_str(&format!("{indent}/* hole of {hole} bytes */\n"));
                }
                // A type without a size takes no room.
                let bits = match m.width {
                    0 => self.btf.bytes_of(m.type_id).unwrap_or(0).saturating_mul(8),
                    width => width.into(),
                };
                end = end.max(m.bit.saturating_add(bits));
                self.member(&m, start, depth + 1)?;
            }
            let size = self.btf.bytes_of(id).unwrap_or(0);
            let hole = size.saturating_mul(8).saturating_sub(end) / 8;
            if r.kind == TypeKind::Struct && hole > 0 {
                self.out
                    .push_str(&format!("{indent}/* {hole} bytes of padding */\n"));
            }
        }
        self.out.push_str(&"\t".repeat(depth));
        self.out.push('}');
        Some(())
    }

    fn member(&mut self, m: &Member, start: u64, depth: usize) -> Option<()> {
        let bit = start.checked_add(m.bit)?;
        // A type without a size is shown with 0.
        let size = self.btf.bytes_of(m.type_id).unwrap_or(0);
        let mut name = self.btf.name(m.name);
        let indent = "\t".repeat(depth);
        self.out.push_str(&indent);
        let begin = self.out.len();
        let nested = self.btf.strip(m.type_id);
        let anonymous = name.is_empty()
            && self
                .btf
                .record(nested)
                .is_some_and(|r| matches!(r.kind, TypeKind::Struct | TypeKind::Union));
        let mut part = DescribedMember {
            name: name.clone(),
            declaration: String::new(),
            offset: bit / 8,
            size,
            bits: None,
        };
        if m.width != 0 {
            // The offset is that of the unit the bit field is taken from, as pahole shows it.
            let unit = size.checked_mul(8).filter(|&u| u != 0).unwrap_or(8);
            part.offset = bit / unit * unit / 8;
            part.bits = Some((bit % unit, m.width));
            name.push_str(&format!(":{}", m.width));
        }
        let place = self.parts.len();
        self.declare(m.type_id, &name, bit, depth)?;
        self.out.push(';');
        // `begin` was the length before, and text is only added.
        let written = self.out.get(begin..).unwrap_or_default();
        let last = written.rsplit('\n').next().unwrap_or_default();
        let tabs = depth * 8;
        let width = tabs + last.trim_start_matches('\t').chars().count();
        part.declaration = match written.contains('\n') {
            true => self.btf.line(m.type_id, &name, depth, &self.steps)?,
            false => written.trim_end_matches(';').to_owned(),
        };
        self.pay(written.len() + part.declaration.len())?;
        let pad = " ".repeat(COLUMN.saturating_sub(width).max(1));
        let offset = match part.bits {
            Some((bit, _)) => format!("{:5}:{bit:2}", part.offset),
            None => format!("{:5}   ", part.offset),
        };
        self.out
            .push_str(&format!("{pad}/* {offset} {size:5} */\n"));
        if !anonymous {
            // Members of a structure that is written out in place are not listed, but the structure
            // itself is.
            self.parts.truncate(place);
            self.parts.push(part);
        }
        Some(())
    }
}

fn open(kind: TypeKind) -> bool {
    matches!(
        kind,
        TypeKind::Struct | TypeKind::Union | TypeKind::Enum | TypeKind::Enum64
    )
}

#[cfg(test)]
mod tests;
