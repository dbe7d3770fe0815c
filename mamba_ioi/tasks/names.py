"""Common English first names, and which of them prompts may use under a tokenizer."""

from __future__ import annotations

from collections import Counter

from transformers import PreTrainedTokenizerBase

_TEXT = """
Aaron Abby Abigail Abraham Adam Adrian Agnes Alan Albert Alec Alex Alexander Alexandra Alexis Alfred Alice
Alicia Alison Allan Allen Allison Alyssa Amanda Amber Amelia Amy Andrea Andrew Andy Angel Angela Angie Anita
Ann Anna Anne Annette Annie Anthony Anton April Archie Ariel Arnold Arthur Ashley Audrey Austin Ava Barbara
Barry Beatrice Becky Bella Ben Benjamin Bernard Bernie Beth Betty Beverly Bill Billy Blake Bob Bobby Bonnie
Brad Bradley Brandon Brenda Brett Brian Bridget Brittany Brooke Bruce Bryan Caleb Calvin Cameron Carl Carla
Carlos Carmen Carol Caroline Carrie Casey Cassie Catherine Cecil Cedric Charles Charlie Charlotte Chelsea
Cheryl Chloe Chris Christian Christina Christine Christopher Claire Clara Clarence Clark Claude Clifford
Clinton Cody Colin Connie Connor Corey Courtney Craig Crystal Curtis Cynthia Daisy Dale Dallas Damian Dan
Dana Daniel Danielle Danny Darren Dave David Dawn Dean Deborah Debbie Denise Dennis Derek Diana Diane
Dominic Don Donald Donna Doris Dorothy Doug Douglas Drew Duncan Dustin Dylan Earl Eddie Edgar Edith Edmund
Edward Edwin Eileen Elaine Eleanor Eli Elijah Elizabeth Ella Ellen Ellie Elliot Emily Emma Eric Erica Erik
Erin Ernest Ethan Eugene Eva Evan Eve Evelyn Faith Felix Fiona Florence Floyd Frances Francis Frank Franklin
Fred Freddie Frederick Gabriel Gary Gavin Gene Geoffrey George Gerald Gilbert Gina Glenn Gloria Gordon Grace
Graham Grant Greg Gregory Guy Hailey Hannah Harold Harriet Harris Harry Harvey Hazel Heather Hector Heidi
Helen Henry Herbert Herman Holly Hope Howard Hugh Hugo Hunter Ian Irene Iris Isaac Isabel Isabella Ivan Ivy
Jack Jackie Jackson Jacob Jake James Jamie Jan Jane Janet Janice Jared Jasmine Jason Jay Jean Jeff Jeffrey
Jennifer Jenny Jeremy Jerome Jerry Jesse Jessica Jessie Jill Jim Jimmy Joan Joanna Joe Joel John Johnny Jon
Jonathan Jordan Joseph Josh Joshua Joy Joyce Juan Judith Judy Julia Julian Julie June Justin Karen Karl Kate
Katherine Kathleen Kathy Katie Keith Kelly Kenneth Kenny Kevin Kim Kimberly Kirk Kristen Kurt Kyle Lance
Larry Laura Lauren Laurie Lawrence Leah Lee Leo Leon Leonard Leslie Lewis Liam Lily Linda Lindsay Lisa Liz
Lloyd Logan Lois Loren Lori Louis Louise Lucas Lucy Luis Luke Luther Lydia Lynn Mabel Madison Maggie Marcus
Margaret Maria Marian Marie Marilyn Mario Marion Mark Marlene Marshall Martha Martin Marvin Mary Mason Matt
Matthew Maurice Max Maxwell Megan Melanie Melissa Melvin Meredith Mia Michael Michelle Mike Mildred Miles
Milton Miranda Mitchell Molly Monica Morgan Morris Murray Nancy Naomi Natalie Nathan Nathaniel Neil Nelson
Nicholas Nick Nicole Nina Noah Noel Nora Norma Norman Oliver Olivia Oscar Otto Owen Paige Pamela Parker
Patricia Patrick Paul Paula Pauline Pearl Peggy Penny Percy Perry Peter Phil Philip Phillip Phoebe Phyllis
Preston Rachel Ralph Ramona Randy Raymond Rebecca Regina Reid Renee Rex Rhonda Richard Rick Ricky Riley Rita
Robert Robin Rodney Roger Roland Ron Ronald Ronnie Rosa Rose Rosemary Ross Roy Ruby Russell Ruth Ryan Sally
Sam Samantha Samuel Sandra Sara Sarah Scott Sean Sebastian Seth Shane Shannon Sharon Shawn Sheila Shelby
Sherry Shirley Sidney Simon Sophia Sophie Spencer Stacy Stan Stanley Stella Stephanie Stephen Steve Steven
Stewart Stuart Sue Summer Susan Suzanne Sydney Sylvia Tamara Tammy Tanya Tara Taylor Ted Teresa Terry Thelma
Theodore Theresa Thomas Tiffany Tim Timothy Tina Toby Todd Tom Tony Tracy Travis Trevor Troy Tyler Valerie
Vanessa Vera Vernon Veronica Victor Victoria Vincent Violet Virginia Vivian Wade Wallace Walter Wanda Warren
Wayne Wendy Wesley Wilbur Will William Winston Xavier Yvonne Zachary Zoe
"""

NAMES: tuple[str, ...] = tuple(_TEXT.split())


def single_token_names(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """The names of `NAMES` that prompts may use under this tokenizer, in the order of `NAMES`.

    Kept is a name that is one token after a space, a token of its own and not the unknown one. Of two such
    names of which one begins the other, such as "Dan" and "Daniel", the longer is kept.
    """
    return list(name_tokens(tokenizer))


def name_tokens(tokenizer: PreTrainedTokenizerBase) -> dict[str, int]:
    """The names that `single_token_names` keeps, each with its token id."""
    encoded = tokenizer([" " + name for name in NAMES], add_special_tokens=False)["input_ids"]
    single = {
        name: ids[0]
        for name, ids in zip(NAMES, encoded, strict=True)
        if len(ids) == 1 and ids[0] != tokenizer.unk_token_id
    }
    uses = Counter(single.values())
    return {
        name: token
        for name, token in single.items()
        if uses[token] == 1 and not any(other.startswith(name) for other in single if other != name)
    }
